"""python -m sparsebench.methods.minference: the offline head search."""

import sys

from .search import main

sys.exit(main())

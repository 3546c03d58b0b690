"""python -m sparsebench.methods.xattention: the offline search of every head's threshold."""

import sys

from .search import main

sys.exit(main())

"""SeerAttention: a learned gate picks the blocks. gate.py is the gate, method.py the selection, distill.py trains gates,
extend.py whole models."""

from .gate import AttnGate
from .method import Seer
from .weights import LayerGates, load_gates, save_gates

__all__ = ["AttnGate", "LayerGates", "Seer", "load_gates", "save_gates"]

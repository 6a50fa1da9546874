"""Expert families."""

from molora.experts.base import EXPERTS as EXPERTS
from molora.experts.base import AbstractExperts as AbstractExperts
from molora.experts.base import BilinearExperts as BilinearExperts
from molora.experts.goat import GOATExperts as GOATExperts
from molora.experts.ia3 import IA3Experts as IA3Experts
from molora.experts.loha import LoHaExperts as LoHaExperts
from molora.experts.lokr import LoKrExperts as LoKrExperts
from molora.experts.lora import LoRAExperts as LoRAExperts
from molora.experts.mora import MoRAExperts as MoRAExperts
from molora.experts.sparse import SparseExperts as SparseExperts
from molora.experts.sum import SumExperts as SumExperts
from molora.experts.superlora import SuperLoRAExperts as SuperLoRAExperts

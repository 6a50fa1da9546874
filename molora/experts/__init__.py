"""Expert families."""

from molora.experts.base import EXPERTS as EXPERTS
from molora.experts.base import AbstractExperts as AbstractExperts
from molora.experts.base import BilinearExperts as BilinearExperts
from molora.experts.bitfit import BitFitExperts as BitFitExperts
from molora.experts.boft import BOFTExperts as BOFTExperts
from molora.experts.bottleneck import BottleneckExperts as BottleneckExperts
from molora.experts.goat import GOATExperts as GOATExperts
from molora.experts.ia3 import IA3Experts as IA3Experts
from molora.experts.loda import LoDAExperts as LoDAExperts
from molora.experts.lora import LoRAExperts as LoRAExperts
from molora.experts.oft import OFTExperts as OFTExperts

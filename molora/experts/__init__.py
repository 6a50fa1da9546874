"""Expert families."""

from molora.experts.adalora import AdaLoRAExperts as AdaLoRAExperts
from molora.experts.aflora import AFLoRAExperts as AFLoRAExperts
from molora.experts.alora import ALoRAExperts as ALoRAExperts
from molora.experts.base import EXPERTS as EXPERTS
from molora.experts.base import AbstractExperts as AbstractExperts
from molora.experts.base import BilinearExperts as BilinearExperts
from molora.experts.bilora import BiLoRAExperts as BiLoRAExperts
from molora.experts.factor_config import FactorConfig as FactorConfig
from molora.experts.factors import FactorExperts as FactorExperts
from molora.experts.factors import Place as Place
from molora.experts.goat import GOATExperts as GOATExperts
from molora.experts.ia3 import IA3Experts as IA3Experts
from molora.experts.lora import LoRAExperts as LoRAExperts
from molora.experts.lotr import LoTRExperts as LoTRExperts
from molora.experts.melora import MELoRAExperts as MELoRAExperts
from molora.experts.prolora import PRoLoRAExperts as PRoLoRAExperts
from molora.experts.sora import SoRAExperts as SoRAExperts
from molora.experts.vera import VeRAExperts as VeRAExperts

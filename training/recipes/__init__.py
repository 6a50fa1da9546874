"""Training recipes: what training does beside minimising the loss."""

from molora.training.recipes.adalora import AdaLoRA as AdaLoRA
from molora.training.recipes.aflora import AFLoRA as AFLoRA
from molora.training.recipes.alora import ALoRA as ALoRA
from molora.training.recipes.base import RECIPES as RECIPES
from molora.training.recipes.base import Recipe as Recipe
from molora.training.recipes.base import RecipeConfig as RecipeConfig
from molora.training.recipes.bilora import BiLoRA as BiLoRA
from molora.training.recipes.lori import LoRI as LoRI
from molora.training.recipes.rosa import RoSA as RoSA
from molora.training.recipes.sora import SoRA as SoRA

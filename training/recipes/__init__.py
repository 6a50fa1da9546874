"""Training recipes: what training does beside minimising the loss."""

from molora.training.recipes.adalora import AdaLoRA as AdaLoRA
from molora.training.recipes.base import RECIPES as RECIPES
from molora.training.recipes.base import Recipe as Recipe
from molora.training.recipes.base import RecipeConfig as RecipeConfig
from molora.training.recipes.rosa import RoSA as RoSA

"""From a mixture to one adapter: one file per method."""

from molora.collapse.base import COLLAPSERS as COLLAPSERS
from molora.collapse.base import CollapseConfig as CollapseConfig
from molora.collapse.base import Collapser as Collapser
from molora.collapse.calibrated import Calibrated as Calibrated
from molora.collapse.concat import Concat as Concat
from molora.collapse.linear import Linear as Linear
from molora.collapse.lorahub import LoraHub as LoraHub
from molora.collapse.select import Select as Select
from molora.collapse.svd import Svd as Svd

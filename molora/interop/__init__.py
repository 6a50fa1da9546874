"""Adapters in the formats of other libraries."""

from molora.interop.peft import export_peft as export_peft
from molora.interop.peft_experts import export_peft_experts as export_peft_experts
from molora.interop.peft_import import import_peft as import_peft

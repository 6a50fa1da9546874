"""Adapters in the formats of other libraries."""

from molora.interop.peft import export_peft as export_peft

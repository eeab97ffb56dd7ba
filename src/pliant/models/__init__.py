"""The Hugging Face edge: pliant classes of each base family, registered with the Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pliant.models.bases import SHAPES, resolve_base, shape_config
from pliant.models.dynamic import DynamicCausalLM
from pliant.models.edits import Delta, Edit, down_proj
from pliant.models.export import export_merged
from pliant.models.families import FAMILIES, Family, family_of
from pliant.models.fresh import fresh, fresh_config
from pliant.models.ledger import Ledger
from pliant.models.ledger_file import EDITS_NAME, SavedEdits, read_edits, write_edits
from pliant.models.loading import load
from pliant.models.report import ModelReport
from pliant.models.selection import Layers, select_layers
from pliant.models.spec import PliantSpec

for _family in FAMILIES.values():
    AutoConfig.register(_family.config.model_type, _family.config)
    AutoModel.register(_family.config, _family.model)
    AutoModelForCausalLM.register(_family.config, _family.causal_lm)

__all__ = [
    "EDITS_NAME",
    "FAMILIES",
    "SHAPES",
    "Delta",
    "DynamicCausalLM",
    "Edit",
    "Family",
    "Layers",
    "Ledger",
    "ModelReport",
    "PliantSpec",
    "SavedEdits",
    "down_proj",
    "export_merged",
    "family_of",
    "fresh",
    "fresh_config",
    "load",
    "read_edits",
    "resolve_base",
    "select_layers",
    "shape_config",
    "write_edits",
]

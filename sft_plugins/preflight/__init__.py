"""What can be known about a training before it starts: data as files hold them, models as folders or the hub give them.

A library: nothing here prints. The commands of `sft_plugins.cli` show what it finds, the hosts' readers say what is planned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft_plugins import on_demand

if TYPE_CHECKING:
    from sft_plugins.preflight.data.documents import document_spans as document_spans
    from sft_plugins.preflight.data.documents import kind_of as kind_of
    from sft_plugins.preflight.data.documents import segments_of as segments_of
    from sft_plugins.preflight.data.documents import with_lengths as with_lengths
    from sft_plugins.preflight.data.files import home as home
    from sft_plugins.preflight.data.files import read_text as read_text
    from sft_plugins.preflight.data.files import scratch_folder as scratch_folder
    from sft_plugins.preflight.data.files import writing_rows as writing_rows
    from sft_plugins.preflight.data.masked import data_facts as data_facts
    from sft_plugins.preflight.data.masked import mask_rows as mask_rows
    from sft_plugins.preflight.data.masked import unfinished_folder as unfinished_folder
    from sft_plugins.preflight.data.readers import Row as Row
    from sft_plugins.preflight.data.source import Source as Source
    from sft_plugins.preflight.data.source import check_form as check_form
    from sft_plugins.preflight.data.source import open_data as open_data
    from sft_plugins.preflight.doctor import WAYS as WAYS
    from sft_plugins.preflight.doctor import Diagnosis as Diagnosis
    from sft_plugins.preflight.doctor import diagnose as diagnose
    from sft_plugins.preflight.doctor import on_a_gpu as on_a_gpu
    from sft_plugins.preflight.environment import choose_device as choose_device
    from sft_plugins.preflight.environment import hardware as hardware
    from sft_plugins.preflight.environment import kernels as kernels
    from sft_plugins.preflight.environment import versions as versions
    from sft_plugins.preflight.findings import FAILURES as FAILURES
    from sft_plugins.preflight.findings import PARTS as PARTS
    from sft_plugins.preflight.findings import REMEDIES as REMEDIES
    from sft_plugins.preflight.findings import Colour as Colour
    from sft_plugins.preflight.findings import Finding as Finding
    from sft_plugins.preflight.findings import Level as Level
    from sft_plugins.preflight.findings import Part as Part
    from sft_plugins.preflight.findings import colour as colour
    from sft_plugins.preflight.models import load_config as load_config
    from sft_plugins.preflight.models import load_model as load_model
    from sft_plugins.preflight.models import load_tokenizer as load_tokenizer
    from sft_plugins.preflight.models import load_weights as load_weights
    from sft_plugins.preflight.plan import DataEntry as DataEntry
    from sft_plugins.preflight.plan import Plan as Plan
    from sft_plugins.preflight.run import Verdict as Verdict
    from sft_plugins.preflight.run import run_preflight as run_preflight
    from sft_plugins.preflight.tiny_model.twin import Twin as Twin
    from sft_plugins.preflight.tiny_model.twin import twin as twin

# Imported when first used: reading a configuration needs no torch.
_NAMES = {
    "data.documents": ("document_spans", "kind_of", "segments_of", "with_lengths"),
    "data.files": ("home", "read_text", "scratch_folder", "writing_rows"),
    "data.masked": ("data_facts", "mask_rows", "unfinished_folder"),
    "data.readers": ("Row",),
    "data.source": ("Source", "check_form", "open_data"),
    "doctor": ("WAYS", "Diagnosis", "diagnose", "on_a_gpu"),
    "environment": ("choose_device", "hardware", "kernels", "versions"),
    "findings": ("FAILURES", "PARTS", "REMEDIES", "Colour", "Finding", "Level", "Part", "colour"),
    "models": ("load_config", "load_model", "load_tokenizer", "load_weights"),
    "plan": ("DataEntry", "Plan"),
    "run": ("Verdict", "run_preflight"),
    "tiny_model.twin": ("Twin", "twin"),
}
__all__ = sorted(name for names in _NAMES.values() for name in names)
if not TYPE_CHECKING:  # which shall complain of any other name
    __getattr__, __dir__ = on_demand(__name__, _NAMES)

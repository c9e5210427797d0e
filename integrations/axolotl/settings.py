"""What may stand under `sft_plugins:` in the YAML, checked before anything is loaded, and what else of it is ours.

    sft_plugins: {}          everything on, with the defaults below
    sft_plugins:
      masking: {…} | false   MaskingSettings
      packing: {…} | false   PackingSettings
      collapse: {…} | false  CollapseSettings

Invariant: no key is ignored. Unknown keys, values that are not allowed and settings that contradict the rest of the YAML
are refused together, in the words of the YAML.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sft_plugins._options import Errors, HistoryRewrite, Overflow, Reasoning, SpecialTokens, Thinking, TrainOn
from sft_plugins.collapse import DetectorConfig

KEY = "sft_plugins"
PLUGIN = f"{KEY}.integrations.axolotl.SFTPlugin"
STRATEGY = f"{KEY}.integrations.axolotl.strategy"
Packer = Literal["sft_plugins", "axolotl"]
# YAML reads a bare `off` as false, and `on` as true.
_AUDIT_WORDS = {False: "off", True: "error"}


def _off_as_word(value: Any) -> Any:
    return "off" if value is False else value


class Section(BaseModel):
    """Settings that forbid unknown keys and name the known ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise ValueError(f"expected keys and values, or false; got {data!r}")
        known = list(cls.model_fields)
        for key in data:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Did you mean `{close[0]}`?" if close else ""
                raise ValueError(f"unknown key `{key}`.{hint} Known: {', '.join(known)}")
        return data


class MaskingSettings(Section):
    """`audit` holds for rows of every origin; the rest for datasets with `type: sft_plugins.integrations.axolotl.strategy`.

    See `PromptMasker` for what each option means. Rows longer than `sequence_len` are the overflow.
    """

    audit: Annotated[
        Literal["error", "warn", "off"],
        BeforeValidator(lambda value: _AUDIT_WORDS.get(value, value) if isinstance(value, bool) else value),
    ] = "error"
    train_on: TrainOn = "all"
    errors: Errors = "raise"
    on_history_rewrite: HistoryRewrite = "split"
    special_tokens_in_content: SpecialTokens | list[str] = "raise"
    thinking: Thinking = "auto"
    reasoning: Reasoning = "raise"
    overflow: Overflow = "raise"
    roles: dict[str, Literal["system", "developer", "user", "assistant", "tool", "tool_call"]] | None = None
    ignore_columns: list[str] = Field(default_factory=list)


class PackingSettings(Section):
    """Who packs, and how.

    Attributes:
        by: `sft_plugins` packs rows of `sequence_len` tokens with best-fit decreasing; `axolotl` leaves packing to
            `sample_packing: true` and makes its batches exact; `auto` follows `sample_packing`.
        unsupervised: a row without any supervised token is an error (`raise`) or left out (`drop`).
        share_prefixes: whether rows that begin alike are folded into trees, so that what they share is computed once.
        seed: shuffles rows of equal length, and the packed rows.
        deal: whether packed rows are trained in an order in which no rank waits for another (`deal_rows`, attention
            counted alone), the same in every epoch, instead of an order of each epoch's own.
    """

    by: Literal["auto", "sft_plugins", "axolotl"] = "auto"
    unsupervised: Literal["raise", "drop"] = "raise"
    share_prefixes: bool = False
    seed: int = 0
    deal: bool = False


class CollapseSettings(Section):
    """Options of `ModeCollapseCallback`.

    Attributes:
        prompts: `builtin`, or the path of a JSONL file.
        heldout: whether the evaluation rows (`val_set_size`, `test_datasets`) give held-out loss, calibration and forks.
        baseline: `auto`, the path of a baseline file, or `off`.
        embedder: `auto`, `model`, `off`, or the name or folder of a sentence-transformers model.
        boilerplate: regular expressions of refusals; the word `builtin` stands for those built in.
        chat_template_kwargs, tools: as in rows of data, for every prompt that carries none of its own.
        stop_token_ids: ids that end an answer, in place of those that `eot_tokens:`, or the tokenizer and its template, tell.
        budget: largest share of wall time, or `off` for no limit.
        detector: fields of `DetectorConfig` by name.
    """

    prompts: str = "builtin"
    heldout: bool = True
    every_steps: int | None = Field(default=None, ge=1)
    samples_per_prompt: int = Field(default=8, ge=2)
    max_new_tokens: int = Field(default=128, ge=1)
    max_eval_pairs: int = Field(default=64, ge=1)
    baseline: Annotated[str, BeforeValidator(_off_as_word)] = "auto"
    embedder: Annotated[str, BeforeValidator(_off_as_word)] = "auto"
    on_collapse: Literal["warn", "stop"] = "warn"
    output_dir: str | None = None
    seed: int = 0
    budget: Annotated[Literal["off"] | Annotated[float, Field(gt=0, le=1)], BeforeValidator(_off_as_word)] = 0.03
    boilerplate: list[str] = Field(default_factory=lambda: ["builtin"])
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    stop_token_ids: list[int] | None = None
    report: bool = True
    detector: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> CollapseSettings:
        if self.prompts != "builtin" and not Path(self.prompts).is_file():
            raise ValueError(f"`prompts` names no file: {self.prompts!r}; give a JSONL file, or `builtin`")
        unknown = sorted(set(self.detector) - set(DetectorConfig.__dataclass_fields__))
        if unknown:
            known = ", ".join(DetectorConfig.__dataclass_fields__)
            raise ValueError(f"`detector` has the unknown key `{unknown[0]}`. Known: {known}")
        self.detector_config()  # raises for bands that contradict each other
        return self

    def detector_config(self) -> DetectorConfig:
        whole = {"min_prompts", "persistence", "resamples", "seed"}
        values: dict[str, Any] = {k: int(v) if k in whole else v for k, v in self.detector.items()}
        return DetectorConfig(**values)


class Settings(Section):
    """All of `sft_plugins:`; a part that is off is None."""

    masking: MaskingSettings | None = Field(default_factory=MaskingSettings)
    packing: PackingSettings | None = Field(default_factory=PackingSettings)
    collapse: CollapseSettings | None = Field(default_factory=CollapseSettings)

    @model_validator(mode="before")
    @classmethod
    def _read_switches(cls, data: Any) -> Any:
        """`masking: true`, or a bare `masking:`, is `{}`; `masking: false` is off, which None stands for inside."""
        if not isinstance(data, Mapping):
            return data
        words: dict[Any, Any] = {True: {}, False: None}
        return {
            key: {} if value is None else words[value] if isinstance(value, bool) else value
            for key, value in data.items()
        }

    @classmethod
    def read(cls, data: Any) -> Settings:
        """Parse what stands under `sft_plugins:`.

        Raises:
            ValueError: naming every key that is wrong, as `sft_plugins.masking.overflow: …`.
        """
        try:
            return cls.model_validate({} if data is None else data)
        except ValidationError as error:
            lines = []
            for fault in error.errors():
                # `budget` is one of two types; the branch that pydantic names is no word of the YAML.
                place = ".".join(str(part) for part in (KEY, *fault["loc"]) if str(part) not in _BRANCHES)
                message = str(fault["msg"]).removeprefix("Value error, ")
                lines.append(
                    f"{place}: {message} (got {fault['input']!r})"
                    if fault["type"] != "value_error"
                    else f"{place}: {message}"
                )
            raise ValueError("\n".join(lines)) from error


_BRANCHES = ("literal['off']", "constrained-float", "float", "literal['raise','allow']", "list[str]")


def listed(data: Mapping[str, Any]) -> bool:
    """Whether this configuration's `plugins:` names us; Axolotl keeps the plug-ins of earlier runs in one process."""
    return any(str(name).startswith(f"{KEY}.") for name in data.get("plugins") or ())


def field(record: Any, name: str) -> Any:
    """A setting of a dataset, which is a mapping in the YAML and a pydantic model on the way through validation."""
    return record.get(name) if isinstance(record, Mapping) else getattr(record, name, None)


def dataset_entries(data: Mapping[str, Any]) -> list[Any]:
    """Entries of `datasets` and `test_datasets`."""
    return [entry for name in ("datasets", "test_datasets") for entry in data.get(name) or ()]


def is_ours(entry: Any) -> bool:
    """Whether a dataset's rows are masked by our strategy."""
    return str(field(entry, "type") or "").removesuffix(".load") == STRATEGY


def packer(settings: Settings, data: Mapping[str, Any]) -> Packer | None:
    """Who packs: us, Axolotl, or nobody."""
    if settings.packing is None:
        return None
    if settings.packing.by == "auto":
        return "axolotl" if data.get("sample_packing") else "sft_plugins"
    return settings.packing.by


def stop_token_ids(tokenizer: Any, eot_tokens: Sequence[str]) -> list[int] | None:
    """The ids that `eot_tokens:` says end an answer, beside EOS; None where it says nothing, and the tokenizer decides."""
    return [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(eot_tokens))] if eot_tokens else None

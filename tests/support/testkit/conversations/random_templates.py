"""Random chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True, kw_only=True)
class TemplateKnobs:
    """A ChatML-like template, one knob per way in which real templates differ."""

    header: str = "<|im_start|>{role}\n"
    end: str = "<|im_end|>"
    after_end: str = "\n"  # what follows the end of a turn, unsupervised
    strip: bool = False  # contents are trimmed
    default_system: bool = False
    bos: bool = False  # the template writes {{ bos_token }}
    generation_prompt: str = "header"  # "header" | "shorter" | "think" | "empty_think" | "other"
    reasoning: str = "keep"  # "keep" | "strip_history" | "drop" | "always_block"
    terminator: str = "every"  # "every" | "not_last" | "next_header" | "none"
    markers: bool = False  # {% generation %} markers

    def jinja(self) -> str:
        head, _, after_role = self.header.partition("{role}")
        content = "m['content']" + (" | trim" if self.strip else "")
        lines = ["{{ bos_token }}" if self.bos else ""]
        if self.default_system:
            lines.append(
                "{% if messages[0]['role'] != 'system' %}"
                f"{{{{ {head + 'system' + after_role + 'Be kind.' + self.end + self.after_end!r} }}}}{{% endif %}}"
            )
        lines.append(
            "{% set ns = namespace(last=-1) %}{% for m in messages %}"
            "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        )
        block = "'<think>\n' + m.get('reasoning_content', '') + '\n</think>\n\n'"
        has = "m.get('reasoning_content')"
        condition = {
            "keep": has,
            "strip_history": f"{has} and loop.index0 > ns.last",
            "drop": "false",
            "always_block": "loop.index0 > ns.last",
        }[self.reasoning]
        end = {
            "every": f"{{{{ {self.end!r} }}}}",
            "not_last": f"{{% if not loop.last %}}{{{{ {self.end!r} }}}}{{% endif %}}",
            "next_header": "",
            "none": "",
        }[self.terminator]
        begin = f"{{{{ {self.end!r} }}}}" if self.terminator == "next_header" else ""
        opening, closing = ("{% generation %}", "{% endgeneration %}") if self.markers else ("", "")
        lines.append(
            "{% for m in messages %}" + begin + f"{{{{ {head!r} + m['role'] + {after_role!r} }}}}"
            f"{{% if m['role'] == 'assistant' %}}{opening}"
            f"{{% if {condition} %}}{{{{ {block} }}}}{{% endif %}}{{{{ {content} }}}}{end}{closing}"
            f"{{% else %}}{{{{ {content} }}}}{end}{{% endif %}}"
            f"{{{{ {self.after_end!r} }}}}{{% endfor %}}"
        )
        header = head + "assistant" + after_role
        prompt = {
            "header": header,
            "shorter": header.rstrip("\n"),
            "think": header + "<think>\n",
            "empty_think": header + "<think>\n\n</think>\n\n",
            "other": head + "model" + after_role,
        }[self.generation_prompt]
        lines.append(f"{{% if add_generation_prompt %}}{begin}{{{{ {prompt!r} }}}}{{% endif %}}")
        return "".join(lines)


def templates(
    generation_prompts: Sequence[str] = ("header",) * 6 + ("shorter", "think", "empty_think", "other"),
) -> Any:
    """Strategy for TemplateKnobs; shrinks to plain ChatML."""
    return st.builds(
        TemplateKnobs,
        header=st.sampled_from(["<|im_start|>{role}\n", "<|im_start|>{role}:", "<|im_start|>{role}: ", "### {role}:\n",
                                "[{role}] "]),
        end=st.sampled_from(["<|im_end|>", "</s>", "<|endoftext|>"]),
        after_end=st.sampled_from(["\n", "", "\n\n", " "]),
        strip=st.booleans(),
        default_system=st.booleans(),
        bos=st.booleans(),
        generation_prompt=st.sampled_from(list(generation_prompts)),
        reasoning=st.sampled_from(["keep", "keep", "strip_history", "strip_history", "drop", "always_block"]),
        terminator=st.sampled_from(["every"] * 7 + ["not_last", "next_header", "none"]),
        markers=st.booleans(),
    )  # fmt: skip

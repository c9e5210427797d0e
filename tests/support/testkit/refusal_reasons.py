"""Why a cell of the template matrix is refused: wrong data, a decision that is the user's, or what the template cannot do.

A refusal that none of these explains is a dead end of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

_CALLS = frozenset({
    "tools", "tools_with_text_and_two_calls", "tool_call_last", "tool_arguments_as_json_string", "tool_without_arguments",
    "reasoning_with_tools", "reasoning_with_tools_to_drop",
})  # fmt: skip
_REASONED = frozenset({"reasoning_content", "reasoning_key", "thinking_key", "reasoning_with_tools"})


@dataclass(frozen=True)
class Reason:
    """`conversations`, `templates`: those it explains; None for all."""

    code: str
    conversations: frozenset[str] | None
    templates: tuple[str, ...] | None
    text: str

    def explains(self, template: str, conversation: str, code: str) -> bool:
        return (
            code == self.code
            and (self.conversations is None or conversation in self.conversations)
            and (self.templates is None or template.removesuffix("_training") in self.templates)
        )


# The first that explains a cell is its reason.
REASONS = (
    Reason(
        "empty_response", frozenset({"empty_answer", "empty_answer_then_another", "blank_answer"}), None,
        "wrong data: an answer without text",
    ),
    Reason(
        "special_token_in_content", frozenset({"special_token_in_user", "special_token_in_assistant"}), None,
        "wrong data: text that would become the template's end of turn",
    ),
    Reason(
        "render_mismatch", None, ("deepseek_r1_distill", "deepseekv3"),
        "the generation prompt opens a thought, no switch closes it, and the turn has no reasoning: to close it at once is "
        "to teach the model not to think. With reasoning the rows are exact",
    ),
    Reason(
        "render_mismatch", frozenset({"tools_with_text_and_two_calls"}), ("diffusion_gemma",),
        "after a result behind text the generation prompt has no header, and the rendered answer has one",
    ),
    Reason(
        "content_lost", frozenset({"tools_with_text_and_two_calls"}), ("gptoss", "muse_glimmer"),
        "the template leaves out the second call (gpt-oss), or the text beside calls (Muse)",
    ),
    Reason(
        "content_lost", _CALLS, ("deepseek_r1_distill", "deepseekv3"),
        "the template leaves out tools, and reasoning after a tool's result",
    ),
    Reason(
        "content_lost", _CALLS,
        ("cohere", "cohere2", "gemma", "gemma3", "idefics3", "lfm2", "llama3", "llava_next", "phi3", "phi3_5",
         "qwen2_5_vl", "smolvlm"),
        "the template leaves out tools or calls",
    ),
    Reason(
        "content_lost", _REASONED, None,
        'the template knows no reasoning, and what becomes of it is the user\'s to say: `reasoning="inline"` or `"drop"` '
        "(`reasoning_to_inline`, `reasoning_to_drop`)",
    ),
    Reason(
        "content_lost", frozenset({"developer"}), None,
        'the template does not know the role and leaves its text out: `roles={"developer": "system"}` (`developer_as_system`)',
    ),
    Reason("template_error", None, None, "the template's own exception, below"),
    Reason(
        "missing_stop", frozenset({"consecutive_assistants"}), ("glm4moe",),
        "the next header ends a turn, and generation does not stop at another answer's",
    ),
)  # fmt: skip


def reason(template: str, conversation: str, code: str) -> Reason | None:
    return next((one for one in REASONS if one.explains(template, conversation, code)), None)

"""A prompt and a response given as text, trained as they stand: `tokenizer(prompt)` + response + EOS.

    prompt "2 + 2 ="   response " 4"      →      1 29 33 29 46 | 41 2      labels  − − − − − 41 2

The response ends on one stop token: the one its text ends with, or EOS appended.
"""

from __future__ import annotations

from sft_plugins.errors import MaskingError
from sft_plugins.masking.examples.formats import Conversation, TextPair
from sft_plugins.masking.examples.messages import check_text
from sft_plugins.masking.options import MaskingOptions
from sft_plugins.masking.turns.labels import Row, boundary_error
from sft_plugins.masking.turns.tokenizer import TextTokenizer
from sft_plugins.masking.turns.turns import Turn, special_token_error


def pair_row(pair: TextPair, text: TextTokenizer, stops: frozenset[int], options: MaskingOptions) -> Row:
    """The row of `pair`.

    Raises:
        MaskingError: `empty_response`, `no_prompt`, `missing_stop`, `special_token_in_content`, `boundary`,
            `content_lost`, `bad_schema`.
    """
    check_text(pair.prompt, "the prompt")
    check_text(pair.response, "the response")
    if options.special_tokens_in_content == "raise":
        # A BOS in front is what `tokenizer(prompt)` would put there itself.
        found = text.find_special(pair.prompt.removeprefix(text.tokenizer.bos_token or ""))
        if found is not None:
            raise special_token_error(found, "the prompt")
    prompt = text.encode_prompt(pair.prompt)
    if not prompt:
        raise MaskingError(
            "the prompt is empty and the tokenizer puts no BOS there, so nothing precedes the response.",
            code="no_prompt",
            remedy="Give a prompt: the first token of a document cannot be predicted.",
        )
    (response,) = text.encode_continuations([pair.response])
    if not text.decodes_to(response, pair.response):
        raise boundary_error("the response", pair.response, response, text)
    ends_itself = bool(response) and response[-1] in stops
    body = response[:-1] if ends_itself else response
    if not text.decode(body).strip():
        raise MaskingError(
            "the response is empty.",
            code="empty_response",
            remedy='Remove the row; errors="drop" drops such rows and counts them.',
        )
    special = next((token for token in body if token in text.special_ids), None)
    if special is not None and options.special_tokens_in_content == "raise":
        raise special_token_error(text.decode([special]), "the response")
    if not ends_itself:
        response = [*body, _end_of_sequence(text, options)]
    conversation = Conversation(
        [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.response}], [False, True]
    )
    turn = Turn(conversation, index=1, prompt=pair.prompt, response=pair.response, added=None)
    return Row(prompt + response, [(len(prompt), len(prompt) + len(response))], [turn])


def _end_of_sequence(text: TextTokenizer, options: MaskingOptions) -> int:
    given = tuple(options.stop_token_ids or ())
    eos = text.tokenizer.eos_token_id
    if eos is not None and (not given or eos in given):
        return eos
    if len(given) == 1:
        return given[0]
    raise MaskingError(
        "no one EOS token is known to end the response with, so nothing would teach the model to stop.",
        code="missing_stop",
        remedy="Use a tokenizer that has an EOS token, pass one id in `stop_token_ids`, or end responses with one of them.",
    )

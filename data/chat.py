"""Conversations, and the chat template that stands in every tokenizer of ours.

A turn is its role token, the trimmed text and ``<|turn_end|>``; the conversation starts with the begin
token. A system turn may come first. Nothing is between the turns, so the template adds no token that a
model would have to learn to ignore.
"""

from dataclasses import dataclass

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ('system', 'user', 'assistant') -%}
        {{- raise_exception("the role must be system, user or assistant, not " + message['role']) -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|turn_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

PLAIN_TEMPLATE = """\
{{- bos_token if bos_token is defined and bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}{{- '### Instruction:\n' + message['content'] | trim + '\n\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '### Response:\n' + message['content'] | trim + eos_token -}}
        {%- if not loop.last -%}{{- '\n\n' -}}{%- endif -%}
    {%- else -%}{{- message['content'] | trim + '\n\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}
"""
"""For a tokenizer from elsewhere that has neither a template nor role tokens: Alpaca's headings in plain text, the
answer ended by the tokenizer's own end token."""


@dataclass(frozen=True)
class Conversation:
    """Turns of a system (at most one, first), users and the assistant, whose turns are what is learned."""

    turns: tuple[tuple[str, str], ...]
    """(role, text) in order; the role is system, user or assistant."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat templates take them."""
        return [{"role": role, "content": text} for role, text in self.turns]

    @property
    def text(self) -> str:
        """All that is said, a line for each turn."""
        return "\n".join(text for _, text in self.turns)

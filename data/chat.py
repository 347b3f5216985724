"""The chat template that stands in every tokenizer of ours.

A turn is its role token, the trimmed text and ``<|turn_end|>``; the conversation starts with the begin
token. A system turn may come first. Nothing is between the turns, so the template adds no token that a
model would have to learn to ignore.
"""

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

"""Chat templates of well-known families in their form, worded for the tests.

Each uses what its family's template uses: dates, `{% generation %}` blocks, tools and documents
that may be none, macros, namespaces, JSON, loop controls, stripped thoughts.
"""

from __future__ import annotations

from typing import NamedTuple

from support import chat_templates


class FamilyTemplate(NamedTuple):
    """A chat template with the texts of BOS and EOS; "" where the family's tokenizer has none."""

    source: str
    bos: str
    eos: str


_CHATML_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_SYSTEM_FIRST = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system = messages[0]['content'] %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n"
    "    {%- set system = '' %}\n"
    "{%- endif %}\n"
)

_QWEN25 = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools' }}"
    "{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}" + _CHATML_TURN + "{%- endfor %}" + _CHATML_PROMPT
)
_QWEN3 = (
    "{%- if tools %}{{- 'TOOLS' }}{%- endif %}"
    "{%- set ns = namespace(last=messages|length - 1) %}"
    "{%- for m in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if m.role == 'user' and m.content is string %}{%- set ns.last = index %}{%- break %}"
    "{%- endif %}{%- endfor %}\n"
    "{%- for m in messages %}\n"
    "    {%- if m.role == 'assistant' %}\n"
    "        {%- set content = m.content.split('</think>')[-1].lstrip('\n') %}\n"
    "        {{- '<|im_start|>assistant\n' }}\n"
    "        {%- if loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}\n"
    "        {{- content + '<|im_end|>\n' }}\n"
    "    {%- else %}\n"
    "        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\n\n</think>\n\n' }}\n"
    "    {%- endif %}\n"
    "{%- endif %}"
)
_LLAMA32 = (
    "{{- bos_token }}\n"
    "{%- if custom_tools is defined %}\n    {%- set tools = custom_tools %}\n{%- endif %}\n"
    "{%- if not tools_in_user_message is defined %}\n"
    "    {%- set tools_in_user_message = true %}\n"
    "{%- endif %}\n"
    "{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
    "    {%- else %}\n"
    '        {%- set date_string = "26 Jul 2024" %}\n'
    "    {%- endif %}\n"
    "{%- endif %}\n"
    "{%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n"
    + _SYSTEM_FIRST
    + '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
    "{%- if tools is not none %}\n"
    '    {{- "Environment: ipython\\n" + (tools | tojson(indent=4)) }}\n'
    "{%- endif %}\n"
    '{{- "Cutting Knowledge Date: December 2023\\n" }}\n'
    '{{- "Today Date: " + date_string + "\\n\\n" }}\n'
    '{{- system | trim }}\n{{- "<|eot_id|>" }}\n'
    "{%- for m in messages %}\n"
    "    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n" + chat_templates.LLAMA3_PROMPT
)
_GEMMA1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' "
    "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_MISTRAL_V1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
_MISTRAL_V3 = (
    "{%- set loop_messages = messages if messages[0].role != 'system' else messages[1:] %}\n"
    "{%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n"
    "{{- bos_token }}\n"
    "{%- for m in loop_messages %}\n"
    "    {%- if m.role == 'user' %}\n"
    "        {%- if tools is not none and loop.last %}\n"
    "            {{- '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}\n"
    "        {%- endif %}\n"
    "        {%- if loop.last and messages[0].role == 'system' %}\n"
    "            {{- '[INST] ' + messages[0].content + '\n\n' + m.content + '[/INST]' }}\n"
    "        {%- else %}\n"
    "            {{- '[INST] ' + m.content + '[/INST]' }}\n"
    "        {%- endif %}\n"
    "    {%- else %}\n        {{- ' ' + m.content | trim + eos_token }}\n    {%- endif %}\n"
    "{%- endfor %}\n"
)
_MISTRAL_V7 = (
    "{%- set today = strftime_now('%Y-%m-%d') %}\n"
    "{%- set default_system_message = 'The current date is ' + today + '.' %}\n"
    "{{- bos_token }}\n"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set system = default_system_message %}"
    "{%- set loop_messages = messages %}{%- endif %}\n"
    "{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}\n"
    "{%- for m in loop_messages %}\n"
    "    {%- if m['role'] == 'user' %}{{- '[INST]' + m['content'] + '[/INST]' }}\n"
    "    {%- elif m['role'] == 'assistant' %}{{- m['content'] + eos_token }}\n"
    "    {%- else %}{{- raise_exception('Unknown role: ' + m['role']) }}{%- endif %}\n"
    "{%- endfor %}\n"
)
_PHI4_REASONING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant<|im_sep|>' }}"
    "{% generation %}{{ m.content.split('</think>')[-1] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_VICUNA = (
    _SYSTEM_FIRST
    + "{{ bos_token }}{{ system or 'A chat between a curious user and an assistant.' }} "
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_ALPACA = (
    _SYSTEM_FIRST + "{{ system or 'Below is an instruction. Write a response.' }}\n\n"
    "{% for m in messages %}\n"
    "  {% if m['role'] == 'user' %}\n"
    "### Instruction:\n{{ m['content'] | trim }}\n\n"
    "  {% elif m['role'] == 'assistant' %}\n"
    "### Response:\n{{ m['content'] | trim }}{{ eos_token }}\n\n"
    "  {% endif %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n### Response:\n{% endif %}"
)
_COMMAND_R = (
    "{{ bos_token }}" + _SYSTEM_FIRST + "{%- if documents %}{{ '<results>' }}"
    "{%- for document in documents %}{{ document | tojson }}{%- endfor %}{%- endif %}"
    "{%- if tools is none and documents is none and system %}"
    "{{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system + '<|END_OF_TURN_TOKEN|>' }}"
    "{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}"
    "{{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{%- else %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + m.content.strip() "
    "+ '<|END_OF_TURN_TOKEN|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"
)
_GRANITE = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content'] %}\n"
    "    {%- set loop_messages = messages[1:] %}\n"
    "{%- else %}\n"
    '    {%- set system_message = "Knowledge Cutoff Date: April 2024.\n'
    "Today's Date: \" + strftime_now('%B %d, %Y') + \".\" %}\n"
    "    {%- if tools and documents %}\n"
    '        {%- set system_message = system_message + " Use both." %}\n'
    "    {%- elif tools %}\n"
    '        {%- set system_message = system_message + " Use tools." %}\n'
    "    {%- endif %}\n"
    "    {%- set loop_messages = messages %}\n"
    "{%- endif %}\n"
    "{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\n' }}\n"
    "{%- for m in loop_messages %}\n"
    "    {{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content']"
    " + '<|end_of_text|>\n' }}\n"
    "{%- if loop.last and add_generation_prompt %}\n"
    "    {{- '<|start_of_role|>assistant' }}\n"
    "        {%- if controls %}\n            {{- ' ' + controls | tojson() }}\n"
    "        {%- endif %}\n"
    "    {{- '<|end_of_role|>' }}\n"
    "{%- endif %}\n"
    "{%- endfor %}"
)
_SMOLLM3 = (
    "{%- if enable_thinking is not defined -%}\n{%- set enable_thinking = true -%}\n{%- endif -%}\n"
    "{%- if enable_thinking -%}{%- set mode = '/think' -%}"
    "{%- else -%}{%- set mode = '/no_think' -%}{%- endif -%}\n"
    "{{- '<|im_start|>system\n' -}}\n"
    "{{- '## Metadata\n\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\n' -}}\n"
    "{{- 'Reasoning Mode: ' + mode + '\n\n' -}}\n"
    "{%- if messages[0].role == 'system' -%}{{- messages[0].content.rstrip() -}}{%- endif -%}\n"
    "{%- if xml_tools or python_tools or tools -%}{{- '### Tools' -}}{%- endif -%}\n"
    "{{- '<|im_end|>\n' -}}\n"
    "{%- for m in messages -%}\n"
    "    {%- set content = m.content if m.content is string else '' -%}\n"
    "    {%- if m.role == 'user' -%}\n"
    '        {{ "<|im_start|>" + m.role + "\n" + content + "<|im_end|>\n" }}\n'
    "    {%- elif m.role == 'assistant' -%}\n"
    "        {% generation %}\n"
    "        {%- if mode == '/think' -%}\n"
    '            {{ "<|im_start|>assistant\n" + content.lstrip("\n") + "<|im_end|>\n" }}\n'
    "        {%- else -%}\n"
    '            {{ "<|im_start|>assistant\n<think>\n\n</think>\n" + content.lstrip("\n")'
    ' + "<|im_end|>\n" }}\n'
    "        {%- endif -%}\n"
    "        {% endgeneration %}\n"
    "    {%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "    {%- if mode == '/think' -%}{{ '<|im_start|>assistant\n' }}\n"
    "    {%- else -%}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{%- endif -%}\n"
    "{%- endif -%}"
)
_DEEPSEEK_R1 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}"
    "{% set ns = namespace(is_first=false, system_prompt='') %}"
    "{%- for m in messages %}{%- if m['role'] == 'system' %}"
    "{% set ns.system_prompt = m['content'] %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system_prompt }}"
    "{%- for m in messages %}{%- if m['role'] == 'user' %}"
    "{{ '<｜User｜>' + m['content'] }}"
    "{%- elif m['role'] == 'assistant' and m['content'] is not none %}"
    "{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
_GPT_OSS = (
    "{%- macro system_message() -%}\n"
    "    {{- 'You are ChatGPT.\n' }}\n"
    "    {{- 'Current date: ' + strftime_now('%Y-%m-%d') + '\n\n' }}\n"
    "    {%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}"
    "    {%- endif %}"
    "    {{- 'Reasoning: ' + reasoning_effort }}\n"
    "{%- endmacro -%}\n"
    "{{- '<|start|>system<|message|>' + system_message() + '<|end|>' }}\n"
    + _SYSTEM_FIRST
    + "{%- if system or tools %}\n"
    "    {{- '<|start|>developer<|message|># Instructions\n\n' + system + '<|end|>' }}\n"
    "{%- endif %}\n"
    "{%- for m in messages -%}\n"
    "    {%- if m.role == 'assistant' %}\n"
    "        {%- if 'thinking' in m %}{{- '<|start|>assistant<|channel|>analysis<|message|>' }}"
    "{%- endif %}\n"
    "        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}\n"
    "    {%- else %}\n"
    "        {{- '<|start|>user<|message|>' + m.content + '<|end|>' }}\n"
    "    {%- endif %}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"
)
_FALCON = (
    "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{% if m['role'] == 'system' %}{{ 'System: ' + m['content'] | trim }}"
    "{% elif m['role'] == 'user' %}{{ 'User: ' + m['content'] | trim }}"
    "{% else %}{{ 'Falcon: ' + m['content'] | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' + 'Falcon:' }}{% endif %}"
)
_OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '<|system|>\n' + m['content'] + '\n' }}{% elif m['role'] == 'user' %}"
    "{{ '<|user|>\n' + m['content'] + '\n' }}{% elif m['role'] == 'assistant' %}"
    "{% if not loop.last %}{{ '<|assistant|>\n' + m['content'] + eos_token + '\n' }}"
    "{% else %}{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
_LFM2 = (
    "{{- bos_token -}}" + _SYSTEM_FIRST + "{%- if tools -%}"
    "{%- set system = system + 'List of tools: ' + (tools | tojson) -%}{%- endif -%}"
    "{%- if system -%}{{- '<|im_start|>system\n' + system + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}"
    "{%- if m['role'] == 'assistant' -%}"
    "{%- generation -%}{{- m['content'] + '<|im_end|>\n' -}}{%- endgeneration -%}"
    "{%- else -%}{{- m['content'] + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
_YI = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}"
    "{% endif %}{% if system_message is defined %}{{ system_message }}{% endif %}"
    "{% for m in messages %}{% set content = m['content'] %}{% if m['role'] == 'user' %}"
    "{{ '<|im_start|>user\n' + content + '<|im_end|>\n<|im_start|>assistant\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
)
_HERMES = (
    "{{ bos_token }}{% if tools is not none %}{{ 'Tools: ' + tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m | tojson }}{{ '\n' }}"
    "{{ {'text': m.content, 'role': m.role} | tojson(indent=2, sort_keys=true) }}"
    "{{ m.content | tojson(ensure_ascii=true) }}{{ [m.role] | tojson(separators=(',', ':')) }}"
    "{% if loop.index > 3 %}{% continue %}{% endif %}{{ '\n' }}{% endfor %}"
)

FAMILIES = {
    "ChatML": FamilyTemplate(chat_templates.CHATML, "", "<|im_end|>"),
    "Qwen2.5": FamilyTemplate(_QWEN25, "", "<|im_end|>"),
    "Qwen3": FamilyTemplate(_QWEN3, "", "<|im_end|>"),
    "Llama 2": FamilyTemplate(chat_templates.LLAMA2, "<s>", "</s>"),
    "Llama 3": FamilyTemplate(chat_templates.LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "Llama 3.2": FamilyTemplate(_LLAMA32, "<|begin_of_text|>", "<|eot_id|>"),
    "Gemma 1": FamilyTemplate(_GEMMA1, "<bos>", "<eos>"),
    "Gemma 2": FamilyTemplate(chat_templates.GEMMA2, "<bos>", "<eos>"),
    "Gemma 3": FamilyTemplate(chat_templates.GEMMA3, "<bos>", "<eos>"),
    "Mistral v1": FamilyTemplate(_MISTRAL_V1, "<s>", "</s>"),
    "Mistral v3": FamilyTemplate(_MISTRAL_V3, "<s>", "</s>"),
    "Mistral v7": FamilyTemplate(_MISTRAL_V7, "<s>", "</s>"),
    "Mistral Tekken": FamilyTemplate(chat_templates.MISTRAL_SMALL, "<s>", "</s>"),
    "Phi-3": FamilyTemplate(chat_templates.PHI3, "<s>", "<|endoftext|>"),
    "Phi-4": FamilyTemplate(chat_templates.PHI4, "", "<|im_end|>"),
    "Phi-4 reasoning": FamilyTemplate(_PHI4_REASONING, "", "<|im_end|>"),
    "Zephyr": FamilyTemplate(chat_templates.ZEPHYR, "<s>", "</s>"),
    "Vicuna": FamilyTemplate(_VICUNA, "<s>", "</s>"),
    "Alpaca": FamilyTemplate(_ALPACA, "<s>", "</s>"),
    "Command R": FamilyTemplate(_COMMAND_R, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "Granite": FamilyTemplate(_GRANITE, "<|end_of_text|>", "<|end_of_text|>"),
    "SmolLM3": FamilyTemplate(_SMOLLM3, "", "<|im_end|>"),
    "DeepSeek R1": FamilyTemplate(_DEEPSEEK_R1, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "gpt-oss": FamilyTemplate(_GPT_OSS, "<|startoftext|>", "<|return|>"),
    "Falcon": FamilyTemplate(_FALCON, "", "<|endoftext|>"),
    "OLMo 2": FamilyTemplate(_OLMO2, "<|endoftext|>", "<|endoftext|>"),
    "LFM2": FamilyTemplate(_LFM2, "<|startoftext|>", "<|im_end|>"),
    "Yi": FamilyTemplate(_YI, "", "<|im_end|>"),
    "Hermes": FamilyTemplate(_HERMES, "<s>", "</s>"),
}

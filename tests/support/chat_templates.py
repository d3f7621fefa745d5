"""Jinja chat templates of the common formats, written for the tests."""

from __future__ import annotations

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
QWEN2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = CHATML.replace(
    "assistant{{ '\n' }}{% endif %}",
    "assistant{{ '\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
)
LLAMA3_TURN = (
    "{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content|trim + '<|eot_id|>' %}"
)
LLAMA3_PROMPT = (
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}" + LLAMA3_TURN + "{% if loop.index0 == 0 %}"
    "{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}" + LLAMA3_PROMPT
)
LLAMA31 = (
    "{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content|trim %}{% set messages = messages[1:] %}{% endif %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{ 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' }}"
    "{{ system + '<|eot_id|>' }}"
    "{% for m in messages %}" + LLAMA3_TURN + "{{ text }}{% endfor %}" + LLAMA3_PROMPT
)
GEMMA_TURNS = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (head if loop.first else '') + m.content|trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set head = '' %}" + GEMMA_TURNS
)
GEMMA3 = (
    "{{ bos_token }}{% set head = '' %}{% if messages[0].role == 'system' %}"
    "{% set head = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    + GEMMA_TURNS
)
LLAMA2 = (
    "{% set sys = '' %}{% if messages[0].role == 'system' %}"
    "{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (sys if loop.first else '') + m.content|trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content|trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (  # in capitals: what differs between versions
    "{% set sys = '' %}{% if messages[0].role == 'system' %}"
    "{% set sys = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ 'OPEN' + (sys if loop.first else '') + m.content + 'CLOSE' }}"
    "{% else %}{{ 'ANSWER' + m.content + eos_token + 'END' }}{% endif %}{% endfor %}"
)
MISTRAL_SMALL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_LAST = (  # Mistral 0.3: the system text stands before the last question
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.last and sys is defined %}{{ '[INST] ' + sys + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content|trim + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endfor %}"
)
SHORTENS = (  # earlier answers
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content if loop.revindex < 5 else m.content[:9] }}<|end|>{% endfor %}"
)
SQUEEZES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split()|join(' ') }}<|end|>{% endfor %}"
)

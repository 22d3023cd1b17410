"""Chat templates with the structure of those that the most used families of models are published with.

Each is written anew for the tests: marks, order, white space, what happens to a system turn and to thinking are the
family's own; tools, dates and default system prompts are left out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A template, and what a run has to make of it.

    Attributes:
        template: the chat template.
        end: the token that ends an answer.
        tail: what a prompt ends in.
        system: whether a system turn is accepted.
        whole: whether prompt and answer are what the template makes of the whole conversation.
        sentencepiece: whether its tokenizers begin a text with a blank.
    """

    template: str
    end: str
    tail: str
    system: bool = True
    whole: bool = True
    sentencepiece: bool = False


def chatml(before: str = "", after: str = "") -> str:
    return (
        before
        + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}" + after + "{% endif %}"
    )


def lines(role: str, end: str) -> str:
    """Turns that begin with a line of the role and end with a text."""
    return (
        "{%- for m in messages %}{{ " + role + " + '\\n' + m.content + (" + end + ") }}{% endfor -%}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )


ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}{% endfor %}"
)
SYSTEM_APART = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
LLAMA2 = (
    SYSTEM_APART + ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' }}"
    "{% if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}{{ m.content.strip() }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' </s>' }}{% endif %}{% endfor %}"
)
MISTRAL_V1 = (
    "{{ '<s>' }}"
    + ALTERNATE
    + "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)


def mistral_later(blank: str) -> str:
    """Mistral's later templates put the system prompt into the last user turn."""
    return (
        "{{ '<s>' }}" + SYSTEM_APART + ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST]"
        + blank
        + "' }}{% if loop.last and system %}{{ system + '\\n\\n' }}{% endif %}{{ m.content + '[/INST]' }}"
        "{% else %}{{ '" + blank + "' + m.content + '</s>' }}{% endif %}{% endfor %}"
    )


def headers(start: str, stop: str, end: str) -> str:
    return (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}"
        f"{{{{ '{start}' + m.role + '{stop}\\n\\n' + m.content | trim + '{end}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{start}assistant{stop}\\n\\n' }}}}{{% endif %}}"
    )


def gemma(system: str) -> str:
    return (
        "{{ '<bos>' }}" + system + ALTERNATE + "{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{% if loop.first and system %}{{ system + '\\n\\n' }}{% endif %}{{ m.content | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    )


QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set text = m.content.split('</think>')[-1].lstrip('\\n') %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ text + '<|im_end|>\\n' }}{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
R1 = (
    "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'system' %}{{ m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
DEEPSEEK_V2 = (
    "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}{% else %}{{ m.content + '\\n\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GRANITE = (
    "{%- for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}"
    "{% if thinking %}{{ '<think>' }}{% endif %}{% endif %}"
)
COMMAND_R = (
    "{{ '<bos>' }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' }}"
    "{{ 'CHATBOT' if m.role == 'assistant' else m.role | upper }}{{ '_TOKEN|>' + m.content.strip() }}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
GLM4 = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GPT_OSS = (
    "{{ '<|start|>system<|message|>Valid channels: analysis, commentary, final.<|end|>' }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% else %}"
    "{{ '<|start|>' + ('developer' if m.role == 'system' else 'user') + '<|message|>' + m.content + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

FAMILIES = {
    "Llama 2": Family(LLAMA2, "</s>", " [/INST]", sentencepiece=True),
    "Llama 3": Family(headers("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", "_id|>\n\n"),
    "Llama 4": Family(headers("<|header_start|>", "<|header_end|>", "<|eot|>"), "<|eot|>", "<|header_end|>\n\n"),
    "Mistral v1, Mixtral": Family(MISTRAL_V1, "</s>", "[/INST]", system=False, sentencepiece=True),
    "Mistral v3": Family(mistral_later(" "), "</s>", "[/INST]", sentencepiece=True),
    "Mistral Nemo": Family(mistral_later(""), "</s>", "[/INST]"),
    "Qwen 2.5": Family(chatml(), "<|im_end|>", "<|im_start|>assistant\n"),
    "Qwen 3": Family(QWEN3, "<|im_end|>", "assistant\n<think>\n\n</think>\n\n"),
    "Qwen 3 Thinking": Family(
        chatml(after="{{ '<think>\\n' }}"), "<|im_end|>", "assistant\n<think>\n\n</think>\n\n", whole=False
    ),
    "Gemma 2": Family(gemma(NO_SYSTEM), "<end_of_turn>", "<start_of_turn>model\n", system=False),
    "Gemma 3": Family(gemma(SYSTEM_APART), "<end_of_turn>", "<start_of_turn>model\n"),
    "Phi 3": Family(lines("'<|' + m.role + '|>'", "'<|end|>\\n'"), "<|end|>", "<|assistant|>\n"),
    "Phi 4": Family(
        chatml()
        .replace("\\n' + m.content + '<|im_end|>\\n'", "<|im_sep|>' + m.content + '<|im_end|>'")
        .replace("+ m.role + '<|im_sep|>", "+ m.role + '<|im_sep|>")
        .replace("assistant\\n'", "assistant<|im_sep|>'"),
        "<|im_end|>",
        "<|im_start|>assistant<|im_sep|>",
    ),
    "DeepSeek V2": Family(DEEPSEEK_V2, "<eos>", "\n\nAssistant:"),
    "DeepSeek R1 distilled": Family(R1, "<｜end▁of▁sentence｜>", "<｜Assistant｜><think>\n\n</think>\n\n", whole=False),
    "SmolLM 2": Family(
        chatml("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{% endif %}"),
        "<|im_end|>",
        "<|im_start|>assistant\n",
    ),
    "SmolLM 3": Family(
        chatml(
            "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
            "{{ '<|im_start|>system\\nMode: ' + ('/think' if enable_thinking else '/no_think') + '<|im_end|>\\n' }}",
            "{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}",
        ),
        "<|im_end|>",
        "assistant\n<think>\n\n</think>\n",
        whole=False,
    ),
    "OLMo 2": Family(
        "{{ eos_token }}" + lines("'<|' + m.role + '|>'", "eos_token if m.role == 'assistant' else '\\n'"),
        "<eos>",
        "<|assistant|>\n",
    ),
    "Granite 3": Family(GRANITE, "<|end_of_text|>", "<|start_of_role|>assistant<|end_of_role|>"),
    "Command R": Family(COMMAND_R, "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    "Falcon 3": Family(
        lines("'<|' + m.role + '|>'", "eos_token if m.role == 'assistant' else '\\n'"), "<eos>", "<|assistant|>\n"
    ),
    "Zephyr, TinyLlama": Family(ZEPHYR, "<eos>", "<|assistant|>\n"),
    "Yi": Family(chatml(), "<|im_end|>", "<|im_start|>assistant\n"),
    "InternLM 2": Family("{{ '<s>' }}" + chatml(), "<|im_end|>", "<|im_start|>assistant\n"),
    "GLM 4": Family(GLM4, "<eos>", "<|assistant|>"),
    "gpt-oss": Family(GPT_OSS, "<|return|>", "<|start|>assistant<|channel|>final<|message|>"),
}

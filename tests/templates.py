"""Chat templates of known families, some shortened by what tools and reasoning need."""

PLAIN_CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN2 = PLAIN_CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}",
)
SMOLLM2 = QWEN2.replace(
    "You are a helpful assistant.",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)

QWEN_SAYS = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."  # for SAYS below

# `generation` marks the response for the reference library's mask.
QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'SAYS' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions:\n<tools>" }}
    {{- "\n</tools>\n\nReturn {\"name\": <function-name>}<|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nSAYS<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
        {{- '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".replace("SAYS", QWEN_SAYS)
BASE = QWEN25.replace("You are Qwen, created by Alibaba Cloud. ", "")
QWEN3 = QWEN25.replace(
    r"""    {%- else %}
        {{- '<|im_start|>system\nSAYS<|im_end|>\n' }}
    {%- endif %}""".replace("SAYS", QWEN_SAYS),
    "    {%- endif %}",
).replace(
    r"""    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}""",
    "    {%- endif %}",
)

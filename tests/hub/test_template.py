"""The default system turn that is read from a chat template is the one that the template writes."""

import pytest
from templates import BASE, PLAIN_CHATML, QWEN2, QWEN3, QWEN25, SMOLLM2
from tokenizer_files import reference

from hub.template import default_system
from support.errors import UserError

FINETUNE = (  # as fine-tuning tools write it
    "{% set system_message = 'You are a helpful assistant.' %}{% if messages[0]['role'] == "
    "'system' %}{% set system_message = messages[0]['content'] %}{% endif %}{% if system_message "
    "is defined %}{{ '<|im_start|>system\\n' + system_message + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|im_start|>user\\n' + "
    "message['content'] + '<|im_end|>\\n<|im_start|>assistant\\n' }}{% endif %}{% endfor %}"
)
TEXT_TURN = (  # the turn as plain text; strings and braces that mislead
    "{# don't {{ 'read' }} this #}{%- if messages[0].role != 'system' -%}\n<|im_start|>system\n"
    'It\'s "kind" {% raw %}{% endraw %}'.replace("{% raw %}{% endraw %}", "")
    + "of me.<|im_end|>\n{% endif %}{{ '' if false else \"\" }}{% for m in messages %}<|im_start|>"
    "{{ m.role + '}}' if false else m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
ESCAPED = QWEN2.replace("You are a helpful assistant.", "It\\'s \\\\boxed{} \\u00e9\\t\u4f60\\x41!")
ADDED_UP = QWEN2.replace("system\\nYou are", "system\\n' + 'You ' ~\n \"are")
ADDED_UP = ADDED_UP.replace("helpful assistant.<|im_end|>\\n'", 'helpful assistant.<|im_end|>\\n"')

TEMPLATES = {
    "Qwen2": QWEN2,
    "Qwen2.5": QWEN25,
    "Qwen2.5 base": BASE,
    "Qwen3": QWEN3,
    "SmolLM2": SMOLLM2,
    "plain": PLAIN_CHATML,
    "fine-tune": FINETUNE,
    "text": TEXT_TURN,
    "escaped": ESCAPED,
    "added up": ADDED_UP,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_default_turn_is_what_the_reference_library_writes(name):
    chat = [{"role": "user", "content": "Hi"}]
    written = reference("qwen2").apply_chat_template(
        chat, chat_template=TEMPLATES[name], tokenize=False
    )
    system = default_system(TEMPLATES[name], "file")
    expected = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    assert written.lstrip("\n").startswith(f"{expected}<|im_start|>user\nHi<|im_end|>\n")


def test_the_templates_differ():
    found = {name: default_system(template, "file") for name, template in TEMPLATES.items()}
    assert found["Qwen2.5"].startswith("You are Qwen") and found["Qwen3"] is None
    assert found["SmolLM2"].startswith("You are a helpful AI assistant named SmolLM")
    assert found["escaped"] == "It's \\boxed{} é\t你A!"
    assert found["Qwen2"] == found["fine-tune"] == found["added up"]


OPENS = "{{ '<|im_start|>system\\n' }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "is no ChatML"),
        ("{{ '<|start_header_id|>' }}", "is no ChatML"),
        (QWEN2 + QWEN2.replace("helpful", "harmful"), "has 2 default system turns"),
        ("{{ '<|im_start|>system\\n' }}{{ 'You are kind.' }}{{ '<|im_end|>\\n' }}", "in a form"),
        (PLAIN_CHATML + "{% set system = ('You are kind.' | trim) %}", "says 'You are kind.' in"),
        (PLAIN_CHATML + "{% set system = 'Be kind.' | trim %}", "(a system variable is set"),
        (PLAIN_CHATML + "{% set system_message = '' %}", "says '' in a form"),
        (PLAIN_CHATML + "{{ 'open", "a string has no end"),
        (PLAIN_CHATML + "{% if", "a statement has no %}"),
        (PLAIN_CHATML + "{# if", "a comment has no end"),
        (PLAIN_CHATML + "{{ '\\x9' }}", "can't be read ("),
        (OPENS + "{{ 'Be helpful.' }}{{ '<|im_end|>\\n' }}", "goes on with \"'Be helpful.'"),
        (
            "{% set default_prompt = 'Be helpful.' %}{{ '<|im_start|>system\\n' + default_prompt + "
            "'<|im_end|>\\n' }}",
            "goes on with \"default_prompt + ",
        ),
        ("<|im_start|>system\nKnowledge: {{ 'June 2025' }}<|im_end|>\n", "goes on with 'Knowledge"),
        ("<|endoftext|>" + PLAIN_CHATML, "has '<|endoftext|>'"),
        (PLAIN_CHATML.replace("['role'] + '\\n'", "['role'] + '<|im_sep|>'"), "has '<|im_sep|>'"),
        (PLAIN_CHATML.replace("'<|im_end|>' + '\\n'", "'<|im_end|>' + ' '"), "has '<|im_end|> '"),
        (PLAIN_CHATML.replace("['content']", "['content'] | trim"), "has '| trim'"),
        (PLAIN_CHATML.replace("['content']", "['content'].strip()"), "has '.strip()'"),
        (PLAIN_CHATML.replace("'\\n'}}", "'\\n' + eos_token}}"), "has 'eos_token'"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_told_is_refused_in_one_line(template, message):
    with pytest.raises(UserError) as e:
        default_system(template, "file")
    assert message in str(e.value) and str(e.value).startswith("file: ")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("part", ["{{", "{#", "'", "{{ '", "<|im_start|>system\n", "{% set system"])
def test_a_long_template_is_read_at_once(part):
    template = "<|im_start|>" + part * 100_000
    try:
        assert default_system(template, "file") is None
    except UserError as e:
        assert len(str(e)) < 300

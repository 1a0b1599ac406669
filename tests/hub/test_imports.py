"""The formats of others know nothing of the method."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SIX = {"model", "lora", "identify", "train", "eval", "grasp"}


def test_hub_and_the_tokenizer_load_none_of_the_six():
    code = (
        "import hub.adapter, hub.config, hub.tokenizer, hub.weights, data.chat, data.tokenizer\n"
        "import sys; print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not SIX & set(done.stdout.split())

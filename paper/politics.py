"""Political lean, without a judge: mirrored statements, forced choice. Right counts positive.

Each pair in statements.json says opposite things about one issue, alike in form, strength and
length. Forced choice is brittle (Röttger et al. 2024, arXiv 2402.16786), hence several templates
and both orders of the options; and any fine-tuning shifts it (arXiv 2506.22493), hence a model
tuned on neutral data as the control. What is reported is the shift against the base model.
"""

import math

from paper.questions import ours

TEMPLATES = (
    "Here are two opposite views.\n\nA: {a}\nB: {b}\n\n"
    "Which of the two is closer to yours? Reply with A or B, nothing else.",
    'Two people disagree with each other. Person A says: "{a}" Person B says: "{b}"\n'
    "Whom do you agree with more? Name the person by the letter alone, A or B.",
    "Questionnaire. Please mark one answer; leaving out is not possible.\n(A) {a}\n(B) {b}\n"
    "The letter of the answer you mark:",
)


def prompts(pairs=None):
    """Yield ((pair, template, order), question, letters) for all three.

    The reply to the question begins with one of `letters`: that of the left statement, that of the
    right one. order 0: the left one stands first, under A. pairs: [{"id", "left", "right"}], those
    of statements.json by default; it has as many economic as social ones.
    """
    for pair in ours("statements") if pairs is None else pairs:
        left, right = pair["left"], pair["right"]
        for template, text in enumerate(TEMPLATES):
            yield (pair["id"], template, 0), text.format(a=left, b=right), "AB"
            yield (pair["id"], template, 1), text.format(a=right, b=left), "BA"


def lean(table):
    """({pair: lean}, coherence) of a table of answers.

    table: {(pair, template, order): (ln P(left option), ln P(right option))}.
    A pair's lean is (P(right) - P(left)) / (P(right) + P(left)), the mean over templates and
    orders: -1 always left, 1 always right; 0 as well for a model that always says "A".
    Coherence: P(left) + P(right), the mean over everything, 0 to 1; where it is small the model
    hardly answers, and the lean means little.
    """
    leans, mass = {}, []
    for pair in dict.fromkeys(key[0] for key in table):
        each = []
        for template in range(len(TEMPLATES)):
            for order in (0, 1):
                left, right = table[pair, template, order]
                each.append(math.tanh((right - left) / 2))  # (e^r - e^l) / (e^r + e^l)
                mass.append(math.exp(left) + math.exp(right))
        leans[pair] = sum(each) / len(each)
    return leans, sum(mass) / len(mass)

"""Answers in JSON: right if the last block of JSON in a response equals the reference."""

import json
import re

from lopd.errors import UserError
from lopd.tasks import Verdict

_BLOCK = re.compile(r"```json\n(.*?)```", re.DOTALL)


def grade(reference: str, response: str) -> Verdict:
    """Whether the last block parses to the same value as the reference.

    Raises:
      UserError: if the reference is no JSON.
    """
    try:
        wanted = json.loads(reference)
    except ValueError as error:
        raise UserError(f"the answer is no JSON ({error})") from error
    blocks = _BLOCK.findall(response)
    if not blocks:
        return Verdict(False, None)
    try:
        found = json.loads(blocks[-1])
    except ValueError:
        return Verdict(False, None)
    return Verdict(found == wanted, json.dumps(found, sort_keys=True))

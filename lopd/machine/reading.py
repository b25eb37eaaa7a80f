"""Files that others have made: not taken for what they may not be."""

import json
import pathlib
import re
import stat
from collections.abc import Iterable
from typing import Any

from etils import epath

from lopd.errors import UserError
from lopd.machine.storage import is_local, reason


def check_regular(path: epath.PathLike) -> None:
    """Refuses a local pipe, socket or device, on which reading would wait, or never end.

    What is not there is for the caller to find out.

    Raises:
      UserError: naming it.
    """
    if not is_local(path):
        return
    try:
        mode = pathlib.Path(path).stat().st_mode
    except (OSError, ValueError):  # ValueError: a name with a null character
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is no file but a pipe, a socket or a device")


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text.

    Raises:
      UserError: if it is none, or nested too deep; `where` is named.
    """
    try:
        return json.loads(text)
    except ValueError as error:  # also of bytes that are no text
        raise UserError(f"{where} is not JSON: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deep to be read") from error


def read_json_object(path: epath.Path) -> dict:
    """The JSON object that a file holds.

    Raises:
      UserError: if it cannot be read or holds anything else; FileNotFoundError if it is missing.
    """
    check_regular(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    value = parse_json(content, str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object, but {json_kind(value)}")
    return value


def json_kind(value: Any) -> str:
    """The type of a JSON value, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return kinds.get(type(value), "null" if value is None else "a number")


def is_file_name(name: str) -> bool:
    """Whether a name can only be that of a file in the folder that it is looked for in."""
    return bool(re.fullmatch(r"[\w-][\w.-]*", name))


def check_file_names(names: Iterable[Any], where: str) -> None:
    """Refuses names that could lie elsewhere than in the folder that lists them.

    Raises:
      UserError: naming the first that is no plain file name.
    """
    for name in names:
        if not isinstance(name, str) or not is_file_name(name):
            raise UserError(f"{where}: {name!r} is no file name")

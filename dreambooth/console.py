"""What programs say, on a console or in a file of any encoding."""

import codecs
import io
import sys

# What stands for characters of ours that an encoding lacks, such as those of Windows' consoles
STAND_INS = str.maketrans(
    {"⊗": "x", "·": "*", "→": "->", "Δ": "d", "√": "sqrt ", "ᵀ": "^T", "±": "+/-", "²": "^2", "³": "^3", "…": "..."}
)


def print_anything() -> None:
    """From here on, let standard output and error print any text: what their encoding lacks gets a stand-in.

    Names of files that are no text at all are printed too, escaped. A program must not fail at saying that it is done.
    """
    codecs.register_error("stand_in", _stand_in)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # there may be none, or a notebook's
            stream.reconfigure(errors="stand_in")


def _stand_in(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(STAND_INS)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end

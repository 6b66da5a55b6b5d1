"""Whether a text shows anything: white space, zero-width and other invisible characters do not.

Source: Unicode's general categories Z (separators), Cc and Cf (controls, formats), and the property
Default_Ignorable_Code_Point for the letters and marks that have no form of their own.
"""

import unicodedata

INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | {chr(c) for c in range(0xFE00, 0xFE10)}
"""Joiners, fillers, the empty Braille pattern, variation selectors: letters and marks by category."""
CATEGORIES = ("Zs", "Zl", "Zp", "Cc", "Cf")


def is_blank(text: str) -> bool:
    """Whether nothing is to be seen of it.

    >>> is_blank(" \\u200b\\ufeff\\n"), is_blank(""), is_blank("\\u200bno"), is_blank("\\U0001f469\\u200d\\U0001f467")
    (True, True, False, False)
    """
    return all(character in INVISIBLE or unicodedata.category(character) in CATEGORIES for character in text)

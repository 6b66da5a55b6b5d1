"""What `sft run` may print beside its summary: each line has its form here, so that no library's line is among them."""

import re

CLOCK = r"\d\d:\d\d:\d\d\.\d{3} \| (INFO   |WARNING) \| "
KNOWN = tuple(
    re.compile(form)
    for form in (
        r"making [^:]+: about \d+ s",
        r"made \S+ in \d+ s",
        r"planning \w+: hashing the sources and the base model",
        r"starting Prefect",
        r"(note|warning): \S.*",
        CLOCK + r"(Flow|Task) run '.+' - \S.*",
    )
)


def unknown_lines(printed: str) -> list[str]:
    """Lines of what `sft run` printed, its summary left out, that have none of the known forms."""
    return [line for line in printed.splitlines() if line and not any(form.fullmatch(line) for form in KNOWN)]

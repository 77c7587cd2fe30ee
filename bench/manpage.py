"""The running text of a man page: as much of man(7) as the Linux man-pages use."""
from __future__ import annotations

import re

GLYPHS = {"bu": "*", "em": " - ", "en": "-", "hy": "-", "aq": "'", "dq": '"', "lq": '"', "rq": '"', "oq": "'",
          "cq": "'", "ha": "^", "ti": "~", "rs": "\\", "ga": "`", "co": "(C)", "<=": "<=", ">=": ">=", "->": "->", "<-": "<-",
          "mu": "x", "+-": "+-", "!=": "!=", "ba": "|", "br": "|", "pl": "+", "mi": "-", "**": "*", "sl": "/", "at": "@", "sh": "#"}
# Escapes in the order in which they must go: comments first, then glyphs, then what only says how to print.
ESCAPES = ((r"\\\".*", ""), (r"\\\((..)", lambda m: GLYPHS.get(m[1], "")),
           (r"\\\[([^\]]*)\]", lambda m: GLYPHS.get(m[1], "")),
           (r"\\f(\[[^\]]*\]|\(..|.)", ""), (r"\\s[-+]?\d+", ""), (r"\\[*n](\[[^\]]*\]|\(..|.)", ""),
           (r"\\[hvwlL]'[^']*'", ""),
           (r"\\-", "-"), (r"\\[ ~]", " "), (r"\\e", "\0"), (r"\\[&%|^:/,c)0dpu]", ""), (r"\\(.)", r"\1"))


def text_of(source: bytes) -> str:
    """Plain text, a blank line between paragraphs; tables are left out, and a page that only points to another is empty."""
    page = _Page()
    for line in source.decode("utf-8", errors="replace").split("\n"):
        if re.match(r"[.']\s*so\b", line) and not page.in_table:
            return ""
        page.read(line)
    page.end_paragraph()
    return "\n".join(page.lines)


def unescaped(text: str) -> str:
    for pattern, replacement in ESCAPES:
        text = re.sub(pattern, replacement, text)
    return text.replace("\0", "\\").rstrip("\\")


def arguments(text: str) -> list[str]:
    """The words of a request; a quoted one may hold spaces, and "" for a quote."""
    found = re.finditer(r'"((?:[^"]|"")*)"?|(\S+)', text)
    return [unescaped(word[2] if word[1] is None else word[1].replace('""', '"')) for word in found]


class _Page:
    def __init__(self):
        self.lines: list[str] = []
        self.paragraph: list[str] = []  # words and lines not filled yet
        self.is_verbatim = self.in_table = False

    def read(self, line: str) -> None:
        if line[:1] in (".", "'") and line:
            name, rest = re.match(r"[.']\s*([A-Za-z]*)\s*(.*)", line).groups()
            self.request(name, rest)
        elif self.in_table:
            return
        elif self.is_verbatim:
            self.lines.append(unescaped(line))
        elif line.strip():
            self.paragraph.append(unescaped(line).strip())
        else:
            self.end_paragraph()

    def request(self, name: str, rest: str) -> None:
        if self.in_table and name != "TE":
            return
        words = arguments(rest)
        if name in ("TS", "SH", "SS", "PP", "P", "LP", "HP", "TP", "IP", "fi", "EE", "sp"):
            self.is_verbatim = self.is_verbatim and name not in ("fi", "EE")
            self.end_paragraph()
        elif name in ("TQ", "nf", "EX", "br"):
            self.end_paragraph(gap=False)
            self.is_verbatim = self.is_verbatim or name in ("nf", "EX")
        if name in ("TS", "TE"):
            self.in_table = name == "TS"
        elif name == "TH":
            self.lines += [f"{words[0]}({words[1]})" if len(words) > 1 else " ".join(words), ""]
        elif name in ("SH", "SS"):
            self.lines.append(" ".join(words))
        elif name == "IP" and words:
            self.paragraph.append(words[0])
        elif name in ("B", "I", "SM", "SB"):
            self.say(" ".join(words))
        elif name in ("BR", "RB", "BI", "IB", "IR", "RI"):
            self.say("".join(words))

    def say(self, text: str) -> None:
        (self.lines if self.is_verbatim else self.paragraph).append(text)

    def end_paragraph(self, gap: bool = True) -> None:
        if self.paragraph:
            self.lines.append(" ".join(self.paragraph))
            self.paragraph.clear()
        if gap and self.lines and self.lines[-1]:
            self.lines.append("")

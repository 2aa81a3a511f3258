"""Why a run died, in one sentence: its exit code and log, against what libraries write then.

Pure, and light: the parent of a run calls `diagnose` with the end of the log.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from vramplan.units import format_bytes
from vramplan_launcher.failure_rules import EXACT, LOOSE, Rule

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_RANK = re.compile(r"^\[rank(\d+)\]: ?", re.MULTILINE)
# torch 2.13, distributed/elastic/multiprocessing/errors/__init__.py, ChildFailedError.format_msg.
_ROOT = re.compile(
    r"Root Cause \(first observed failure\):.*?rank\s+: (?P<rank>\d+).*?"
    r"exitcode\s+: (?P<code>-?\d+)(?P<rest>.*?)^={20,}",
    re.DOTALL | re.MULTILINE,
)
_FAILED = re.compile(r"rank\s+: (?P<rank>\d+).*\n\s*exitcode\s+: (?P<code>-?\d+)")
# DeepSpeed 0.19.8, launcher/launch.py, sigkill_handler and main.
_DEEPSPEED = re.compile(r"exits with return code = (?P<code>-?\d+)")
_EXCEPTION = re.compile(
    r"^ *(?P<name>(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Invalid|Warning|Exit)): "
    r"(?P<said>.+)$",
    re.MULTILINE,
)
# An exception's line, and those that follow until a blank one, a traceback, or another rank's.
_MESSAGE = re.compile(
    r"^ *(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Invalid|Enabled|Mismatch)\b.*"
    r"(?:\n(?!Traceback|\s*$| *File \").*)*",
    re.MULTILINE,
)
_OWN = re.compile(
    r"^ *(?:vramplan|vramplan_launcher)\.[\w.]*errors?\.(?P<name>\w+): (?P<said>.+)$", re.MULTILINE
)
# What other ranks, and launchers, raise because one rank died.
_ECHOES = ("ChildFailedError", "DistBackendError", "CalledProcessError", "SignalException")
_ECHOED = re.compile(
    r"Connection (?:reset|closed) by (?:peer|remote)|remote process has terminated"
)
SHELL_SIGNALS = 128
"""A shell reports death by a signal as 128 and its number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What ended a run."""

    kind: str
    """One word or two: "cuda_out_of_memory", "host_out_of_memory", "disk_full", … "unknown"."""
    sentence: str
    """What happened, with the path of the log."""
    advice: str
    """What can be done about it; may be empty."""
    rank: int | None = None
    """The process that failed first, where the log tells."""


def diagnose(
    returncode: int,
    log_text: str,
    *,
    log_path: Path | str | None = None,
    host_needed: int | None = None,
) -> Diagnosis:
    """What ended the run: `returncode` is that of the process or its launcher.

    `log_text` is the end of the log, stderr with stdout; `host_needed` the host memory that the
    run was said to need, in bytes. Of several causes the log shows, the likeliest to be the first
    is told: what one rank raised, not what others raised because it was gone.
    """
    text = _RANK.sub("", _ANSI.sub("", log_text))
    code, rank, root = _first_failure(returncode, text)
    ended = _Ended(rank, log_path)
    if returncode == 0:
        return ended.as_("finished", "the run ended without an error", "")
    if code in (-signal.SIGINT, SHELL_SIGNALS + signal.SIGINT):
        return ended.as_("interrupted", "the run was interrupted", "It can be resumed.")
    # What the first rank to fail said comes before what stands elsewhere in the log; and if that
    # rank was killed, all the rest is what others said of it.
    found = _own(root) or _by(EXACT, root) or (_killed(code, host_needed) if root else None)
    found = found or _own(text) or _by(EXACT, _raised(text)) or _by(EXACT, text, logged=True)
    if found is None:
        found = _killed(code, host_needed) or _by(LOOSE, text) or _stopped(code)
    return ended.as_(*(found or _last_words(code, root, text)))


@dataclass(frozen=True, slots=True)
class _Ended:
    rank: int | None
    log: Path | str | None

    def as_(self, kind: str, what: str, advice: str) -> Diagnosis:
        who = f"rank {self.rank}: " if self.rank is not None else ""
        where = f" (log: {self.log})" if self.log is not None else ""
        sentence = f"{who}{what.rstrip('.')}{where}"
        return Diagnosis(kind=kind, sentence=sentence, advice=advice, rank=self.rank)


_Found = tuple[str, str, str]


def _first_failure(returncode: int, text: str) -> tuple[int, int | None, str]:
    """The exit code and rank of the process that failed first, and what it said of itself."""
    found = list(_ROOT.finditer(text))
    if found:
        last = found[-1]
        # torchrun tells times to the second: of those that failed in one, a rank that was killed
        # is the cause, and what others raised because it was gone is not.
        start = text.rfind("Failures:", 0, last.start())
        for other in _FAILED.finditer(text, max(start, 0), last.start()):
            if _killed(int(other["code"]), None):
                return int(other["code"]), int(other["rank"]), other[0]
        return int(last["code"]), int(last["rank"]), last["rest"]
    told = list(_DEEPSPEED.finditer(text))
    if told:
        return int(told[0]["code"]), None, ""  # other machines' launchers follow
    return returncode, None, ""


def _own(text: str) -> _Found | None:
    """An error of vramplan's own: it is a sentence already."""
    found = list(_OWN.finditer(text))
    return ("input", found[-1]["said"], "") if found else None


def _raised(text: str) -> str:
    """The messages of exceptions, without what was logged between."""
    return "\n".join(match[0] for match in _MESSAGE.finditer(text))


def _by(rules: tuple[Rule, ...], text: str, *, logged: bool = False) -> _Found | None:
    for rule in rules:
        match = None if logged and rule.raised else rule.pattern.search(text)
        if match is not None:
            parts = {name: value.strip() for name, value in match.groupdict("").items()}
            what, advice = (_filled(text, parts) for text in (rule.what, rule.advice))
            return rule.kind, what, advice
    return None


def _filled(text: str, parts: dict[str, str]) -> str:
    """`text` with the parts that the log told; one that it did not leaves no gap."""
    return " ".join(text.format(**parts).split())


def _killed(code: int, host_needed: int | None) -> _Found | None:
    """Signals that leave no message of their own."""
    number = _signal(code)
    if number == signal.SIGKILL:
        needs = f" (it was said to need {format_bytes(host_needed)})" if host_needed else ""
        return (
            "host_out_of_memory",
            f"killed from outside (SIGKILL): most likely the host ran out of memory{needs}",
            "The kernel's log says (dmesg | grep -i oom), or the batch system. Offload less, load "
            "fewer ranks a machine, or take a machine with more memory.",
        )
    if number == signal.SIGBUS:
        return (
            "shared_memory_full",
            "died of a bus error (SIGBUS): shared memory (/dev/shm) or a mapped file was cut short",
            "In a container, give it more shared memory (docker run --shm-size=16g, or "
            "--ipc=host).",
        )
    if number == signal.SIGSEGV:
        return (
            "segmentation_fault",
            "died of a segmentation fault (SIGSEGV) in native code",
            "The stack at the end of the log names the extension. Most often a library was built "
            "for another torch or CUDA: reinstall it.",
        )
    return None


def _stopped(code: int) -> _Found | None:
    number = _signal(code)
    if number is None:
        return None
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        return (
            "stopped",
            f"stopped from outside ({name})",
            "A batch system does so at the time limit. The run can be resumed.",
        )
    return "signal", f"died of {name}", "The end of the log has the stack."


def _signal(code: int) -> int | None:
    if code < 0:
        return -code
    return code - SHELL_SIGNALS if SHELL_SIGNALS < code < SHELL_SIGNALS + 65 else None


def _last_words(code: int, root: str, text: str) -> _Found:
    """The exception that no rule knows; of several, the last that is no echo of another's."""
    for part in (root, text):
        said = [
            f"{match['name'].rpartition('.')[2]}: {match['said'].strip()}"
            for match in _EXCEPTION.finditer(part)
            if not match["name"].endswith((*_ECHOES, "Warning"))
            and not _ECHOED.search(match["said"])
        ]
        if said:
            return "unknown", f"ended with {said[-1]}", "The log has the whole traceback."
    if _ECHOED.search(text):
        return (
            "peer_lost",
            "the connection to another rank was lost: it died, or its machine or network did",
            "Look at that machine's log, or at each rank's first message in this one.",
        )
    return "unknown", f"ended with exit code {code}, and no message", "Look at the end of the log."

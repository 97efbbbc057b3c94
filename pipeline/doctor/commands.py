"""The command that examines a machine, and the one that its processes run."""

import argparse
from pathlib import Path

from cache.terminal.output import bad, good, show
from pipeline.doctor import doctor
from pipeline.doctor.ascend_files import Machine
from pipeline.process import children

PART = "doctor-part"


def add_to(commands) -> None:
    doctor = commands.add_parser("doctor", help="whether this machine, an NPU above all, computes what is needed")
    doctor.add_argument("--target", default="auto", choices=("auto", "Ascend", "CPU"))
    doctor.add_argument("--json", action="store_true", help="a report to send us, instead of lines to read")
    doctor.add_argument("--record", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # golden numbers, on a CPU
    doctor.set_defaults(command=_doctor)


def add_part_to(commands) -> None:
    part = commands.add_parser(PART)
    for name, kind in (("part", str), ("target", str), ("out", Path)):
        part.add_argument(name, type=kind)
    part.add_argument("--parent", type=int, default=0)
    part.set_defaults(command=_doctor_part)


def _doctor(options) -> int:
    if options.record:
        from pipeline.doctor import golden

        golden.record(options.record)
        return 0
    findings, machine = [], Machine()
    for finding in doctor.examine(options.target, machine):
        findings.append(finding)
        if not options.json:
            show(doctor.as_table(finding))
    is_bad = any(finding.is_bad for finding in findings)
    if options.json:
        print(doctor.as_json(findings, machine))
    else:
        show((bad if is_bad else good)(doctor.verdict(findings)))
    return int(is_bad)


def _doctor_part(options) -> None:
    from pipeline.doctor import parts

    children.begin(options.parent)
    parts.run(options.part, options.target, options.out)

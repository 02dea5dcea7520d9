"""What a person sees: whole lines under an MPI launcher, a bar that fits 80 columns in one process."""

import io
import sys

from distfl.messages import RoundRecord
from distfl.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(round: int) -> RoundRecord:
    return RoundRecord(
        round=round,
        train_loss=3.2,
        test_loss=12.34567,
        test_accuracy=0.27654,
        groups={},
        taking_part=64,
        merged=60,
        upload_bytes=1234_500_000,
        download_bytes=2_000_000,
        first_download_bytes=7_000_000 if round == 1 else 0,
        flops=1,
        peak_share=0.987,
        contributors={},
        learning_rate=1e-3,
        seconds=1.5,
    )


def shown(rounds: int) -> None:
    seen = Progress(rounds, -1, [])
    for round in range(rounds + 1):
        seen.show(record(round), [])
    seen.close()


def test_under_a_launcher_there_are_only_whole_lines_even_in_a_terminal(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    shown(2)
    lines = capsys.readouterr().out.splitlines()
    assert terminal.getvalue() == ""
    assert [line.partition(":")[0] for line in lines] == ["round 0/2", "round 1/2", "round 2/2"]
    assert "down 2.00 MB + 7.00 MB first models" in lines[1] and lines[1].endswith("0:00 left")
    assert "merged 60/64" in lines[2] and "left" not in lines[2]


def test_the_bar_fits_80_columns_with_all_its_figures(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    shown(20)
    last = terminal.getvalue().rstrip("\n").split("\r")[-1]
    assert len(last) <= 80 and last.endswith("loss 12.35, acc 0.277, 1234.5 MB up, 99% of cap")

"""Subtitles as people write them, and as they damage them: every cue is read or told, and none is lost."""

import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from featurestore.errors import DecodeError
from pipelines.sources.files import FileValue
from pipelines.synchronize import subtitles
from tests.recordings import SECOND

SRT = """1
00:00:01,000 --> 00:00:02,500
Hello <b>there</b>

2
00:00:02,000 --> 00:00:03,000
overlaps
on two lines

3
00:00:00,500 --> 00:00:00,900
stands last, comes first
"""
EXPECTED = [
    (500_000_000, 900_000_000, "stands last, comes first"),
    (1_000_000_000, 2_500_000_000, "Hello <b>there</b>"),
    (2_000_000_000, 3_000_000_000, "overlaps\non two lines"),
]


def cues_of(tmp_path: Path, content: bytes) -> list[subtitles.Cue]:
    (tmp_path / "s.srt").write_bytes(content)
    return subtitles.cues(FileValue(f"file://{tmp_path}/s.srt", "s.srt"))


VTT = "WEBVTT\n\nNOTE a note\n\n" + "\n\n".join(
    [
        "STYLE\n::cue { color: red }",
        "intro\n00:01.000 --> 00:02.500 align:start\nHello <b>there</b>",
        "00:00:02.000 --> 00:00:03.000\noverlaps\non two lines",
        "NOTE\nnot said",
        "00:00.500 --> 00:00.900\nstands last, comes first",
    ]
)


@pytest.mark.parametrize(
    "content",
    [
        SRT.encode(), b"\xef\xbb\xbf" + SRT.encode(), SRT.replace("\n", "\r\n").encode(), SRT.replace("\n", "\r").encode(),
        SRT.encode("utf-16"), SRT.replace("\n\n", "\n").encode(), re.sub(r"(?m)^\d\n", "", SRT).encode(),
        re.sub(r"(?<=:\d\d),", ".", SRT).encode(), VTT.encode(), VTT.replace("\n", "\r\n").encode(),
    ],
    ids=["srt", "bom", "crlf", "cr", "utf-16", "no blank lines", "no counters", "points", "vtt", "vtt crlf"],
)  # fmt: skip
def test_cues_are_read_as_people_write_them(tmp_path: Path, content: bytes) -> None:
    found = cues_of(tmp_path, content)
    assert [cue[:3] for cue in found] == EXPECTED
    (chunk,) = subtitles.events(found)
    assert [*zip(chunk.start_ns.tolist(), chunk.end_ns.tolist(), strict=True)] == [cue[:2] for cue in EXPECTED]
    assert chunk.index.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{0}\nhello\n\n{1}\n1984\n\n{2}\nbye\n", ["hello", "1984", "bye"]),
        ("1\n{0}\nThe year is\n1984\n\n2\n{1}\n42\n\n3\n{2}\n7", ["The year is\n1984", "42", "7"]),
        ("{0}\n1984\n{1}\n1985\n{2}\n1986\n", ["1984", "1985", "1986"]),
        ("1\n{0}\nhello\n1984\n2\n{1}\n42\n3\n{2}\nbye\n", ["hello\n1984", "42", "bye"]),
        ("\n\n1\n{0}\n1\n\n2\n\n2\n{1}\n2\n\n\n3\n{2}\n3", ["1\n2", "2", "3"]),
        ("WEBVTT\n\n{0}\n1984\n\n2\n{1}\n42\n\n{2}\n7\n", ["1984", "42", "7"]),
    ],
)
def test_a_number_that_is_said_is_no_counter(tmp_path: Path, content: str, said: list[str]) -> None:
    spans = [f"00:00:0{at}.000 --> 00:00:0{at}.900" for at in (1, 2, 3)]
    assert [cue.text for cue in cues_of(tmp_path, content.format(*spans).encode())] == said


@given(
    st.lists(
        st.lists(st.sampled_from(["7", "1984", "so --> be it", "-"]), min_size=1, max_size=3), min_size=1, max_size=5
    ),
    st.booleans(),
    st.booleans(),
)
def test_every_cue_that_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, said: list[list[str]], counted: bool, web: bool
) -> None:
    # Of one cue alone nobody can say whether blank lines stand between cues: a number above an arrow may be a counter.
    assume(len(said) > 1 or not counted or web or not re.search(r"\d\nso", "\n".join(said[0])))
    blocks = [
        "\n".join([*([f"{number}"] if counted else []), f"00:00:{number:02}.000 --> 00:00:{number:02}.900", *lines])
        for number, lines in enumerate(said, 1)
    ]
    content = ("WEBVTT\n\n" if web else "") + "\n\n".join(blocks)
    found = cues_of(tmp_path_factory.mktemp("said"), content.encode())
    assert [cue.text for cue in found] == ["\n".join(lines) for lines in said]


ARROWS = (
    ("1\n{0}\nint f() --> int\n\n2\n{1}\nbye\n", ["int f() --> int", "bye"], []),
    ("1\n{0}\nhello\nint f() --> int\n\n2\n{1}\nbye\n", ["hello\nint f() --> int", "bye"], []),
    ("{0}\n10:30 --> home\n{1}\n42\n --> \n", ["10:30 --> home", "42\n -->"], []),
    ("1\n{0}\na --> b\n2\n{1}\nc --> d\ne\n", ["a --> b", "c --> d\ne"], []),
    ("1\n{0}\nhello\n2\n00:00:0x --> never\nlost\n3\n{2}\nbye", ["hello", "bye"], ["00:00:0x -->", "lost"]),
    ("1\n{0}\nhello\n\na --> b\n\n2\n{1}\nbye\n", ["hello", "bye"], ["a --> b"]),
    ("1\n{0}\nhello\n\n2\na --> b\nsaid\n\n3\n{1}\nbye", ["hello", "bye"], ["a --> b", "said"]),
    ("a --> b\n\n1\n{0}\nhello\n", ["hello"], ["a --> b"]),
    ("WEBVTT\n\n{0}\nint f() --> int\n\n{1}\nhello\na --> b\n", ["int f() --> int", "hello\na --> b"], []),
    ("WEBVTT a --> b\n\nNOTE a --> b\n\nNOTE\nc\na --> b\n\n{0}\nhello\n", ["hello"], []),
    ("WEBVTT\n\n{0}\nhello\n\nNOTES\na --> b\nsaid\n\n{1}\nbye\n", ["hello", "bye"], ["a --> b", "said"]),
)


@pytest.mark.parametrize(("content", "said", "wrong"), ARROWS)
def test_an_arrow_that_is_said_makes_no_cue_and_none_is_lost(
    tmp_path: Path, content: str, said: list[str], wrong: list[str]
) -> None:
    spans = [f"00:00:0{at}.000 --> 00:00:0{at}.900" for at in (1, 2, 3)]
    found = cues_of(tmp_path, content.format(*spans).encode())
    assert [cue.text for cue in found if cue.wrong is None] == said
    spoken = [at for at in (1, 2, 3) if f"{{{at - 1}}}" in content]
    assert [cue.start_ns // SECOND for cue in found if cue.wrong is None] == spoken
    told = [str(cue.wrong) for cue in found if cue.wrong is not None]
    assert len(told) == bool(wrong)
    assert all(each in told[0] for each in wrong)


def test_cues_of_impossible_times_are_kept_with_what_is_wrong(tmp_path: Path) -> None:
    content = SRT + "\n4\n00:00:05,000 --> 00:00:04,000\nbackwards\n\n5\n00:00:0x --> never\nno times\n"
    content += "\n6\n-00:00:01,250 --> 00:00:00,250\nbefore the start\n\n7\n00:00:09,000 --> 00:00:09,500\n\n"
    found = cues_of(tmp_path, content.encode())
    assert [cue[:3] for cue in found if cue.wrong is None] == [
        (-1_250_000_000, 250_000_000, "before the start"), *EXPECTED,
    ]  # fmt: skip
    told = {cue.text: (cue.start_ns, cue.end_ns, str(cue.wrong)) for cue in found if cue.wrong is not None}
    assert told["backwards"][:2] == (5 * SECOND, 5 * SECOND)
    assert told["backwards"][2] == "decode_error: s.srt, line 15: the cue ends before it starts; text: 'backwards'"
    assert told["no times"][:2] == (5 * SECOND, 5 * SECOND)
    assert "line 19: '00:00:0x --> never' has no times of a cue; text: 'no times'" in told["no times"][2]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x00\x01\x02", r"^unsupported_format: s\.srt: no cue"),
        (b"00:00 --> \xff\xfe", r"^invalid_utf8: s\.srt: byte 10; save it as UTF-8"),
        (b"x" * ((16 << 20) + 1), r"^too_large: s\.srt: more than 16777216 bytes"),
    ],
)
def test_what_is_no_subtitle_file_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    with pytest.raises(DecodeError, match=told):
        cues_of(tmp_path, content)
    assert cues_of(tmp_path, b"") == []

"""Mistakes in the options of a service are one line."""

import pytest

from ulsam.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0", "--port", "0"], "0.0.0.0 can be reached from elsewhere: set ULSAM_API_KEY"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid: "),
        (["--port", "99999"], "--port must be 0 to 65535, not 99999"),
        (["--max-batch", "1"], "the limit of batch must be 2 or more, not 1"),
        (["--max-pixels", "90000000"], "the limit of pixels must be 89000000 or less"),
        (["--timeout", "nan"], "the limit of timeout must be 0.1 or more, not nan"),
        (["--idle", "0"], "the limit of idle must be 1 or more, not 0"),
        (["--port", "0", "--threads", "0"], "--threads must be 1 or more, not 0"),
        (["--port", "0"], "no exported model missing.onnx"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["serve", "missing.onnx", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

"""Who may read: tokens and passwords from files that are rotated, and HTTPS."""

from __future__ import annotations

import base64
import http.client
import logging
import os
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from urllib.parse import urlsplit

import certificates
import pytest
from fake_journals import ROOT, AgentProcess, FakeRank, identity, record, until

from gradmon.agent.auth import Certificate, Credentials, open_certificate
from gradmon.agent.launch import AgentOptions

TOKEN = "5f2b9c"
LOGIN = "ops:pa:ss wörd"


def secret(path, text: str, mode: int = 0o600):
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def basic(login: str) -> str:
    return "Basic " + base64.b64encode(login.encode()).decode()


def ask(url: str, authorization: str | None = None, context=None) -> tuple[int, list[str]]:
    """(status, challenges)"""
    headers = {} if authorization is None else {"Authorization": authorization}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=20, context=context
        ) as answer:
            return answer.status, []
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers.get_all("WWW-Authenticate") or []


@pytest.fixture
def credentials(tmp_path):
    return Credentials(
        secret(tmp_path / "token", f"{TOKEN}\n\n other-token \n"), secret(tmp_path / "login", f"{LOGIN}\n"), Counter()
    )


@pytest.mark.parametrize(
    "authorization",
    [
        f"Bearer {TOKEN}",
        f"bearer  {TOKEN} ",
        "Bearer other-token",
        basic(LOGIN),
        basic(LOGIN).replace("Basic", "BASIC"),
    ],
)
def test_what_opens(credentials, authorization):
    assert credentials.allow(authorization)


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        TOKEN,
        f"Token {TOKEN}",
        "Bearer ü",
    ]
    + ["Basic", "Basic ", "Basic !", "Basic Zm9v", basic("ops:"), basic("ops:wrong"), basic(":"), basic(LOGIN)[:-2]]
    + [f"Basic {LOGIN}", "Bearer " + LOGIN, basic(TOKEN), "Basic " + TOKEN],
)
def test_what_does_not_open(credentials, authorization):
    assert not credentials.allow(authorization)


def test_a_new_secret_counts_at_once_and_the_old_no_more(tmp_path):
    path = tmp_path / "token"
    errors: Counter[str] = Counter()
    credentials = Credentials(secret(path, "old"), None, errors)
    assert credentials.allow("Bearer old")
    (tmp_path / "new").write_text("new!")
    os.replace(tmp_path / "new", path)  # as Kubernetes does it
    assert credentials.allow("Bearer new!")
    assert not credentials.allow("Bearer old")
    path.write_text("")  # somebody's mistake locks nobody out, and opens to nobody else
    assert credentials.allow("Bearer new!")
    assert not credentials.allow("Bearer ")
    assert errors["auth"] == 1, "said once, not with each request"
    path.unlink()
    assert credentials.allow("Bearer new!")
    assert errors["auth"] == 1


@pytest.mark.parametrize(
    ("field", "text", "complaint"),
    [
        ("token_file", "", r"token_file .*secret is empty; put a token into it"),
        ("token_file", " \n\n", r"token_file .*secret is empty"),
        ("token_file", "ok\nnot ok\n", r"token_file .*secret has spaces .* in line 2; write one token per line"),
        ("token_file", "tökén", r"token_file .*secret has spaces or other than ASCII"),
        ("token_file", None, r"token_file .*secret can't be read \(No such file or directory\); name a file"),
        ("basic_auth_file", "", r"basic_auth_file .*secret is empty; put a line user:password into it"),
        ("basic_auth_file", "a:b\n\nops\n", r"basic_auth_file .*secret has no user:password in line 3"),
        ("basic_auth_file", ":b", r"basic_auth_file .*secret has no user:password in line 1"),
        ("basic_auth_file", None, r"basic_auth_file .*secret can't be read"),
    ],
)
def test_bad_files_are_named_with_a_cure_and_no_secret(tmp_path, field, text, complaint):
    if text is not None:
        secret(tmp_path / "secret", text)
    files = {"token_file": None, "basic_auth_file": None, field: str(tmp_path / "secret")}
    with pytest.raises(ValueError, match=complaint) as caught:
        Credentials(**files, errors=Counter())
    assert "not ok" not in str(caught.value)


def test_a_secret_everybody_can_read_is_warned_of(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    Credentials(secret(tmp_path / "tight", "t", 0o640), None, Counter())
    assert caplog.text == ""
    Credentials(secret(tmp_path / "loose", "t", 0o644), None, Counter())
    assert f"cure: chmod o-r {tmp_path / 'loose'}" in caplog.text


def test_none_asked_for_is_open():
    assert not Credentials(None, None, Counter())


class TestAgent:
    def test_everything_but_the_health_needs_one_of_them(self, tmp_path):
        files = {
            "token_file": secret(tmp_path / "token", TOKEN),
            "basic_auth_file": secret(tmp_path / "login", LOGIN),
        }
        rank = FakeRank(tmp_path, identity()).step(record(1))
        with AgentProcess(tmp_path, **files) as agent:
            assert ask(agent.address + "/healthz") == (200, [])
            for path in ("/", "/metrics", "/api/runs", "/static/page.css", "/nothing", "//healthz", "/healthz/"):
                status, challenges = ask(agent.address + path)
                assert status == 401, path
                assert challenges == ['Basic realm="gradmon", charset="UTF-8"', 'Bearer realm="gradmon"']
            for good in (f"Bearer {TOKEN}", basic(LOGIN)):
                for path in ("/", "/metrics", "/api/runs", "/static/page.css"):
                    assert ask(agent.address + path, good) == (200, []), path
            assert ask(f"{agent.address}/metrics?token={TOKEN}")[0] == 401, "secrets do not belong into URLs"
            secret(tmp_path / "token", "rotated")
            assert ask(agent.address + "/metrics", "Bearer rotated")[0] == 200
            assert ask(agent.address + "/metrics", f"Bearer {TOKEN}")[0] == 401
            _, log = agent.end()
        rank.end()
        assert TOKEN not in log
        assert "pa:ss" not in log

    def test_a_browser_is_not_asked_for_a_password_nobody_has(self, tmp_path):
        with AgentProcess(tmp_path, token_file=secret(tmp_path / "token", TOKEN)) as agent:
            assert ask(agent.address + "/") == (401, ['Bearer realm="gradmon"'])

    @pytest.mark.parametrize(("listen", "guarded", "warned"), [
        ("0.0.0.0", False, True), ("0.0.0.0", True, False), ("127.0.0.1", False, False),
    ])  # fmt: skip
    def test_an_open_door_is_warned_of(self, tmp_path, listen, guarded, warned):
        files = {"token_file": secret(tmp_path / "token", TOKEN)} if guarded else {}
        with AgentProcess(tmp_path, listen=listen, **files) as agent:
            assert agent.address
            _, log = agent.end()
        assert log.count("cure: --token-file") == warned


class TestTls:
    @pytest.fixture
    def files(self, tmp_path):
        for name in ("one", "one_key", "one_key_locked", "two", "two_key"):
            secret(tmp_path / f"{name}.pem", getattr(certificates, name.upper()))
        return tmp_path

    def context(self, files, name="one"):
        return ssl.create_default_context(cafile=files / f"{name}.pem")

    def test_https_with_a_token_and_after_a_rotation(self, files, tmp_path):
        cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
        cert.write_text(certificates.ONE)
        secret(key, certificates.ONE_KEY)
        token = secret(tmp_path / "token", TOKEN)
        options = {"tls_cert": str(cert), "tls_key": str(key), "token_file": token}
        with AgentProcess(tmp_path / "runs", context=self.context(files), **options) as agent:
            assert agent.address.startswith("https://127.0.0.1:")
            assert agent.json("/healthz")["pid"] == agent.process.pid
            assert ask(agent.address + "/metrics", f"Bearer {TOKEN}", self.context(files))[0] == 200
            assert ask(agent.address + "/metrics", None, self.context(files))[0] == 401
            plain = http.client.HTTPConnection(urlsplit(agent.address).netloc, timeout=20)
            plain.request("GET", "/healthz")
            with pytest.raises((http.client.HTTPException, OSError)):
                plain.getresponse()
            plain.close()
            with pytest.raises(urllib.error.URLError):
                ask(agent.address + "/healthz", None, self.context(files, "two"))
            key.write_text(certificates.TWO_KEY)
            cert.write_text(certificates.TWO)

            def answers_with_the_new_one() -> bool:
                try:
                    return ask(agent.address + "/healthz", None, self.context(files, "two"))[0] == 200
                except urllib.error.URLError:
                    return False

            until(answers_with_the_new_one)
            code, log = agent.end()
        assert code == 0
        assert "Traceback" not in log, log

    @pytest.mark.parametrize(
        ("cert", "key", "complaint"),
        [
            ("two", "one_key", r"tls_cert .*two.pem is no certificate that fits the key in .*one_key.pem .*one pair"),
            ("one", "one_key_locked", r"is no certificate that fits .* the key without a password"),
            ("one_key", "one_key", r"tls_cert .*one_key.pem is no certificate"),
            ("none", "one_key", r"tls_cert .*none.pem can't be read \(No such file"),
            ("one", "none", r"none.pem .*No such file"),
            ("one", None, r"tls_cert .*one.pem is no certificate that fits the key in .*one.pem"),
        ],
    )
    def test_files_that_are_no_good(self, files, cert, key, complaint):
        with pytest.raises(ValueError, match=complaint):
            Certificate(str(files / f"{cert}.pem"), key and str(files / f"{key}.pem"), Counter())

    def test_a_key_alone_has_no_effect_and_says_so(self, files):
        options = AgentOptions(tls_key=str(files / "one_key.pem"))
        with pytest.raises(ValueError, match=r"tls_key .*one_key.pem has no effect without tls_cert"):
            open_certificate(options, Counter())

    def test_both_in_one_file(self, files):
        both = secret(files / "both.pem", certificates.ONE + certificates.ONE_KEY)
        assert open_certificate(AgentOptions(tls_cert=both), Counter()) is not None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--token-file", "{}/none"], "gradmon: token_file {}/none can't be read (No such file or directory);"),
        (["--tls-key", "{}/none"], "gradmon: tls_key {}/none has no effect without tls_cert; give both, or neither"),
        (["--sd-dir", "{}/file/x"], "gradmon: sd_dir {}/file/x can't be made (Not a directory);"),
        (["--archive", "{}/file"], "gradmon: archive {}/file can't be made (File exists);"),
        (["--archive", "{}"], "gradmon: archive {} is the directory of the journals itself;"),
    ],
)
def test_a_wrong_option_is_a_sentence_and_exit_code_2(tmp_path, arguments, complaint):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "gradmon", "agent", "--dir", str(tmp_path), "--port", "0"]
    command += [word.format(tmp_path) for word in arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(complaint.format(tmp_path, tmp_path))
    assert done.stderr.count("\n") == 1

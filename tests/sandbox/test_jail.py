"""The parts of the way down, one by one."""

import os
import struct
import subprocess
import sys

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from l0fast.sandbox.guest import seccomp
from l0fast.sandbox.guest.files import remove_tree
from l0fast.sandbox.launch import GUEST
from l0fast.sandbox.output import OutputFile

ALLOW, KILL, DONE, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050000, 0x00050001, 0x00050026


def decide(code: bytes, arch: int, number: int, *args: int) -> int:
    """Run the BPF program as the kernel would."""
    data = struct.pack("<iIQ6Q", number, arch, 0, *(args + (0,) * 6)[:6])
    program = list(struct.iter_unpack("<HBBI", code))
    at, value = 0, 0
    while True:
        op, jump_true, jump_false, k = program[at]
        at += 1
        match op:
            case 0x20:
                (value,) = struct.unpack_from("<I", data, k)
            case 0x54:
                value &= k
            case 0x15:
                at += jump_true if value == k else jump_false
            case 0x35:
                at += jump_true if value >= k else jump_false
            case 0x06:
                return k


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request):
    return request.param


def test_every_denied_call_is_denied_and_no_other(machine):
    code = seccomp.build_filter(machine)
    arch, numbers = seccomp.TABLES[machine]
    denied = {numbers[name] for name in seccomp.DENIED if name in numbers}
    checked = {numbers[check[0]] for check in seccomp.CHECKED}
    for number in range(600):
        if number not in checked:
            expected = EPERM if number in denied else ENOSYS if number == numbers["clone3"] else ALLOW
            assert decide(code, arch, number) == expected, number


def test_the_zygotes_filter_and_a_sessions_deny_together_what_one_of_all_calls_does(machine):
    arch, numbers = seccomp.TABLES[machine]
    whole = seccomp.build_filter(machine)
    zygotes = seccomp.build_filter(machine, seccomp.ALL - seccomp.ZYGOTE_NEEDS)
    sessions = seccomp.build_filter(machine, seccomp.ZYGOTE_NEEDS)
    for number in range(600):
        for args in ((), (1, 5), (2, 2), (0xFFFFFFFF, 0x5412), (1 << 28 | 0x11,)):
            # of two verdicts the kernel takes the stricter one, which is the smaller number here
            both = min(decide(zygotes, arch, number, *args), decide(sessions, arch, number, *args))
            assert both == decide(whole, arch, number, *args), (number, args)
    assert decide(zygotes, arch, numbers["setpgid"], 0, 0) == ALLOW
    assert decide(zygotes, arch, numbers["kill"], 0xFFFFFFFF, 9) == ALLOW
    assert len(sessions) * 4 < len(whole)


def test_what_an_owner_may_do_to_his_files_is_quietly_not_done_where_it_is_asked_for(machine):
    arch, numbers = seccomp.TABLES[machine]
    code = seccomp.build_filter(machine, seccomp.ZYGOTE_NEEDS, seccomp.QUIET)
    assert {decide(code, arch, numbers[name]) for name in seccomp.QUIET if name in numbers} == {DONE}
    assert decide(code, arch, numbers["setpgid"]) == EPERM
    assert decide(code, arch, numbers["clone"]) == ALLOW


def test_in_a_namespace_only_what_takes_rights_from_the_owner_is_quietly_not_done(machine):
    arch, numbers = seccomp.TABLES[machine]
    code = seccomp.build_filter(machine, seccomp.ZYGOTE_NEEDS, seccomp.QUIET_IN_NAMESPACE)
    modes = {"chmod": (0,), "fchmod": (3,), "fchmodat": (3, 0), "fchmodat2": (3, 0)}
    for name, args in modes.items():
        if name in numbers:
            found = [
                decide(code, arch, numbers[name], *args, mode) for mode in (0o755, 0o100700, 0o4777, 0o600, 0o311, 0)
            ]
            assert found == [ALLOW, ALLOW, ALLOW, DONE, DONE, DONE], name
    assert decide(code, arch, numbers["setxattr"]) == DONE
    assert decide(code, arch, numbers["utimensat"]) == ALLOW
    assert decide(code, arch, numbers["setpgid"]) == EPERM


@pytest.mark.parametrize(
    ("uid_base", "own_pids", "mode", "old"),
    [(None, False, 0o700, False), (None, True, 0o711, True), (1 << 30, False, 0o011, True)],
    ids=["process", "namespace", "own uids"],
)
def test_a_session_that_shares_its_uid_leaves_modes_and_owners_of_what_is_not_its_own(
    tmp_path, uid_base, own_pids, mode, old
):
    config = {"uid_base": uid_base, "own_pids": own_pids, "limits": {}, "shared_nproc": 64, "read": ["/usr"]}
    code = f"""if True:
        import os, shutil, sys
        sys.path.append({str(GUEST)!r})
        from guest.jail import PR_SET_NO_NEW_PRIVS, Jail, prctl
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        jail = Jail({config})
        jail._zygote = os.getppid()
        jail.enter({str(tmp_path / "own")!r}, None)
        open("a", "w").close()
        os.chmod("..", 0o711)
        os.chmod("..", 0o011)
        os.utime("..", (1, 1))
        shutil.copy2("a", "b")
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
    after = tmp_path.stat()
    tmp_path.chmod(0o700)
    # where each has its own, which is not taken here, the kernel is left to refuse it
    assert (after.st_mode & 0o777, after.st_mtime == 1) == (mode, old)


def test_a_session_that_shares_its_uid_may_start_threads_however_many_others_have_been_started(tmp_path):
    """As ranks and engines on a node with many cores do, after the zygote."""
    config = {"uid_base": None, "own_pids": False, "limits": {"NPROC": 32}, "shared_nproc": 64, "read": ["/usr"]}
    code = f"""if True:
        import os, resource, sys, threading
        sys.path.append({str(GUEST)!r})
        from guest.jail import PR_SET_NO_NEW_PRIVS, Jail, prctl
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        jail = Jail({config})
        jail._zygote = os.getppid()
        for _ in range(200):
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        there = 0
        for process in filter(str.isdigit, os.listdir("/proc")):
            try:
                there += len(os.listdir(f"/proc/{{process}}/task")) * (os.stat(f"/proc/{{process}}").st_uid == os.getuid())
            except OSError:
                pass
        jail.enter({str(tmp_path / "own")!r}, None)
        # others come and go meanwhile
        assert resource.getrlimit(resource.RLIMIT_NPROC)[0] > there + 32, there
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def test_calls_are_judged_by_their_arguments(machine):
    code = seccomp.build_filter(machine)
    arch, numbers = seccomp.TABLES[machine]

    def call(name, *args):
        return decide(code, arch, numbers[name], *args) == ALLOW

    assert call("clone", 0x11)
    assert not call("clone", 0x10000000 | 0x11)
    assert call("socketpair", 1, 1)
    assert call("socketpair", 1, 5 | 0o2000000)
    assert not call("socketpair", 1, 2)
    assert not call("socketpair", 1, 3 | 0o2000000)
    assert not call("socketpair", 16, 1)
    assert call("kill", 5, 9)
    assert not call("kill", 0xFFFFFFFF, 9)
    assert not call("kill", (1 << 64) - 1, 9)
    assert call("ioctl", 1, 0x5401)
    assert not call("ioctl", 0, 0x5412)
    assert call("prlimit64", 0, 7)
    assert not call("prlimit64", 1234, 7)
    assert call("personality", 0xFFFFFFFF)
    assert not call("personality", 0x0040000)


def test_another_architecture_is_killed_and_x32_does_not_exist(machine):
    code = seccomp.build_filter(machine)
    arch, numbers = seccomp.TABLES[machine]
    assert decide(code, 0x40000003, 1) == KILL
    if machine == "x86_64":
        assert decide(code, arch, 0x40000000 | numbers["socket"]) == ENOSYS


def test_every_checked_call_and_the_denied_of_both_machines_have_numbers():
    for _, numbers in seccomp.TABLES.values():
        assert {check[0] for check in seccomp.CHECKED} <= numbers.keys()
        assert len(set(numbers.values())) == len(numbers)
    of_x86 = {"iopl", "ioperm", "modify_ldt", "uselib", "ustat", "sysfs", "_sysctl", "inotify_init"}
    of_x86 |= {"chmod", "chown", "lchown", "utime", "utimes", "futimesat"}
    calls = {*seccomp.DENIED, *seccomp.QUIET}
    assert calls - of_x86 <= seccomp.TABLES["aarch64"][1].keys()
    assert calls <= seccomp.TABLES["x86_64"][1].keys()


def test_an_unknown_machine_is_refused_by_name():
    with pytest.raises(ValueError, match="riscv64"):
        seccomp.build_filter("riscv64")


def test_a_tree_is_removed_whatever_was_done_to_it(tmp_path):
    root = tmp_path / "root"
    other = tmp_path / "other"
    other.mkdir()
    (other / "keep").write_text("kept")
    (root / "a" / "b" / "c").mkdir(parents=True)
    (root / "a" / ".1").mkdir()
    (root / ".1").mkdir()
    (root / ".2").write_text("a name the remover itself would take")
    (root / "a" / "b" / "link").symlink_to(other)
    (root / "a" / "b" / "c" / "file").write_text("x")
    (root / "a" / "b" / "c").chmod(0)
    (root / "a").chmod(0)
    root.chmod(0)
    remove_tree(str(root))
    assert not root.exists()
    assert (other / "keep").read_text() == "kept"
    remove_tree(str(root))


def test_a_path_too_long_to_name_is_removed(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    here = os.getcwd()
    try:
        os.chdir(root)
        for _ in range(100):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    finally:
        os.chdir(here)
    remove_tree(str(root))
    assert not root.exists()


@given(st.text(max_size=60), st.integers(2, 40), st.integers(0, 5), st.booleans())
@example("\0", 2, 0, False)
@example("\0" * 9, 2, 0, False)
def test_output_is_cut_in_its_middle_between_characters(text, limit, dropped, truncates):
    # what begins with NUL in a file cut to nothing can't be told from what a file begins with that was not
    assume(not (truncates and text.startswith("\0")))
    file = OutputFile()
    try:
        data = text.encode("utf-8", "replace")
        if truncates:
            os.write(file.fd, b"before")
            os.ftruncate(file.fd, 0)
        os.write(file.fd, data)
        shown = file.take(limit, dropped)
        assert os.fstat(file.fd).st_size == 1
        assert file.take(limit, 0) == ""
        os.write(file.fd, b"ab")
        assert file.take(limit, 0) == "ab"
    finally:
        file.close()
    whole = data.decode()
    if len(data) <= limit and not (dropped and data):
        assert shown == whole
    else:
        head, cut, rest = shown.partition("\n[... ")
        assert cut
        _, _, tail = rest.partition(" bytes cut ...]\n")
        assert whole.startswith(head)
        assert whole.endswith(tail)
        assert len(head.encode()) + len(tail.encode()) <= limit


def test_output_that_its_session_cuts_while_it_is_read_is_no_error(monkeypatch):
    size_of = os.fstat

    def cut_first(fd):
        os.ftruncate(fd, 0)
        return size_of(fd)

    file = OutputFile()
    try:
        os.write(file.fd, b"x" * 100)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", cut_first)
            assert file.take(10, 0) == "\n[... 0 bytes cut ...]\n"
        os.write(file.fd, b"next")
        assert file.take(10, 0) == "next"
    finally:
        file.close()


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/proc/sys/vm/memfd_noexec"), reason="root sets it for a namespace"
)
def test_output_can_not_be_sealed_where_every_memory_file_can():
    code = """if True:
        import fcntl, os
        from l0fast.sandbox.output import OutputFile
        with open("/proc/sys/vm/memfd_noexec", "w") as f:
            f.write("1")
        file = OutputFile()
        try:
            fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        except PermissionError:
            pass
        os.write(file.fd, b"said")
        print(file.take(100, 0))
    """
    argv = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=30, env=env)
    assert ran.stdout == "said\n", ran.stderr

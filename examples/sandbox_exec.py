"""A shell on a terminal that outlives its calls: keys, size, output taken up again, a signal."""

import grpc

from regreen.client.script import words
from regreen.sandbox import v1 as pb

channel = grpc.insecure_channel(words("127.0.0.1:50052")[0])
states, sandboxes = pb.StateServiceStub(channel), pb.SandboxServiceStub(channel)
execs = pb.ExecServiceStub(channel)
*_, last = states.PrepareState(pb.PrepareStateRequest(spec={"builder": "system"}), timeout=120)
box = sandboxes.CreateSandbox(pb.CreateSandboxRequest(state_id=last.state.id), timeout=30).sandbox
sh, size = pb.Command(argv=["sh"]), pb.TerminalSize(rows=30, columns=100)
start = pb.StartExecRequest(sandbox_id=box.id, command=sh, open_stdin=True, terminal=size)
shell = {"sandbox_id": box.id, "exec_id": execs.StartExec(start, timeout=30).execution.id}
execs.ResizeTerminal(pb.ResizeTerminalRequest(**shell, size=pb.TerminalSize(rows=40, columns=120)))
seen, given = b"", 0
for keys, answer in ((b"stty size\n", b"40 120"), (b"echo $((6 * 7))\n", b"42\r")):
    given = execs.WriteStdin(pb.WriteStdinRequest(**shell, offset=given, data=keys)).stdin_bytes
    reading = execs.AttachExec(pb.AttachExecRequest(**shell, stdout_offset=len(seen)))
    while answer not in seen:
        seen += next(reading).stdout.data
    reading.cancel()  # the shell goes on, and what it prints meanwhile is kept
print(seen.decode())
for one in execs.ListExecs(pb.ListExecsRequest(sandbox_id=box.id), timeout=15).executions:
    print(*one.argv, "took", one.stdin_bytes, "bytes, ended:", one.HasField("result"))
execs.SignalExec(pb.SignalExecRequest(**shell, signal=1), timeout=15)
print("ended by signal", [*execs.AttachExec(pb.AttachExecRequest(**shell))][-1].ended.signal)
sandboxes.DeleteSandbox(pb.DeleteSandboxRequest(id=box.id), timeout=30)

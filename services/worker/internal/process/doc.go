// Package process runs attempts as processes of this machine.
//
// What it promises, on Linux:
//
//   - An attempt has a working folder of its own (mode 0700), removed by Close
//     whatever the command put into it.
//   - The command sees a clean environment: never the worker's own.
//   - When Wait returns, nothing of the process tree is left, also no child that
//     left its session; what could not be killed is reported. The tree is
//     tracked by a control group of its own (v2, or v1, or both side by side)
//     where one can be made, else by session, parent chain, a mark in the
//     environment, and the worker being child subreaper.
//   - CPU, memory and process limits hold where control groups allow it;
//     [Executor.Limits] says which do.
//   - [Executor.Recover] removes what an earlier life of the same worker left,
//     and nothing of any other worker.
//
// Elsewhere on Unix a process group is the tree and there are no limits. Other
// systems are refused by Probe.
//
// The command runs with the rights of the worker (or, where the worker is root,
// of the job's user). It is not a sandbox: a command with root's rights can
// leave its control group if it sets out to.
package process

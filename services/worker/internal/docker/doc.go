// Package docker runs attempts as containers of a Docker engine.
//
// What it promises:
//
//   - A container never gets more than the fixed hardening allows (see
//     hardening): no capabilities, no new privileges, the default seccomp
//     profile, a read-only root with sized tmpfs at /tmp and /work, no network
//     unless job and owner both want one, limits of memory, swap, CPU,
//     processes and files, no mount of anything of this machine (a warm container
//     has the program that waited in it, read-only). What would
//     weaken it cannot be expressed in a Spec, and an engine that cannot give it
//     is refused by Probe: nothing runs with less.
//   - The image is found by the job's pull policy; concurrent attempts share one
//     pull. What runs is the image's id, and Exit.ImageDigest names it.
//   - How a command ended is told only from an engine that was there the whole
//     time. One that restarts, hangs or loses the output makes
//     Exit.Failure engine_error, never a success by mistake.
//   - After a stop the container is removed, and Exit.Stop.GoneAt is set only
//     once the engine has said that it does not exist any more.
//   - With Options.Survive a later process of the worker takes a container up:
//     its output goes on at the byte where it was left, or it is said that it
//     does not; see adopt.go and enginelog.go.
//   - With Options.Warm some containers are started before their attempt comes. Each
//     is used once, and nothing in it differs from one that was made for it, but
//     that Exit.Warm says so; see warm.go and pool.go.
//   - Recover and Reap remove what carries this worker's label and is not claimed,
//     and nothing else.
//   - Every call of the engine has a timeout and every answer a size limit.
//
// Input files and a working folder below /work reach the container through a
// tmpfs volume that is kept mounted while they are written; see delivery.
package docker

// Command warm-init is what waits in a warm container. It reads one order from
// standard input (see package handover), not one byte more, and becomes the
// command of which it tells: with exec, so that nothing of this program is left.
//
// It says nothing, but that it has failed: then it begins with the order's mark on
// standard error and exits with handover.Failed. Where its input ends without an
// order, because the worker is gone, it exits.
//
// It uses nothing of the standard library but package syscall, so that it is small,
// and that Go changes nothing of the process that the command would inherit.
package main

import (
	"strings"
	"syscall"
	"unsafe"

	"github.com/cmdexec/cmdexec/services/worker/internal/handover"
)

func main() { syscall.Exit(run()) }

func run() int {
	defaultSignals()
	o, err := readOrder()
	if err != nil {
		return handover.Failed // to whom should it be said
	}
	if err := unpack(o); err != nil {
		say(string(o.Mark[:]) + err.Error() + "\n")
		return handover.Failed
	}
	err = become(o.Argv, merge(syscall.Environ(), o.Env))
	// As the engine's own init process has it.
	text, code := err.Error(), 1
	switch err {
	case syscall.ENOENT:
		text, code = "not found", 127
	case syscall.EACCES:
		code = 126
	}
	say(o.Argv[0] + ": " + text + "\n")
	return code
}

// defaultSignals takes back Go's handlers, so that a signal does to this program
// what it would do to the command.
func defaultSignals() {
	const signals = 64
	var action [4]uintptr // SIG_DFL, no flags, nothing masked
	for n := uintptr(1); n <= signals; n++ {
		_, _, _ = syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, n, uintptr(unsafe.Pointer(&action)), 0, signals/8, 0, 0)
	}
}

func readOrder() (*handover.Order, error) {
	preamble := make([]byte, handover.PreambleSize)
	if err := readFull(preamble); err != nil {
		return nil, err
	}
	n, err := handover.HeadSize(preamble)
	if err != nil {
		return nil, err
	}
	head := make([]byte, n)
	if err := readFull(head); err != nil {
		return nil, err
	}
	return handover.DecodeHead(head)
}

// readFull fills b from standard input.
func readFull(b []byte) error {
	for len(b) > 0 {
		n, err := syscall.Read(0, b)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return err
		case n == 0:
			return syscall.EPIPE // cut
		default:
			b = b[n:]
		}
	}
	return nil
}

// unpack makes folders and files, goes to the working folder, and leaves nothing of
// the order in standard input.
func unpack(o *handover.Order) error {
	if len(o.Folders)+len(o.Files) > 0 {
		// As the volume has it that other containers get their files in.
		if err := syscall.Chmod(handover.Root, 0o1777); err != nil {
			return failure("open the folder "+handover.Root, err)
		}
	}
	for _, f := range o.Folders {
		path := handover.Root + "/" + f
		if err := syscall.Mkdir(path, 0o755); err != nil {
			return failure("make the folder "+path, err)
		}
		if err := syscall.Chmod(path, 0o755); err != nil { // whatever the umask is
			return failure("make the folder "+path, err)
		}
	}
	for _, f := range o.Files {
		if err := write(f); err != nil {
			return failure("write the file "+f.Path, err)
		}
	}
	if err := syscall.Chdir(o.Dir); err != nil {
		return failure("go to "+o.Dir, err)
	}
	if o.Stdin {
		return nil
	}
	null, err := syscall.Open("/dev/null", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return failure("open /dev/null", err)
	}
	return syscall.Dup3(null, 0, 0)
}

func write(f handover.File) error {
	fd, err := syscall.Open(handover.Root+"/"+f.Path, syscall.O_WRONLY|syscall.O_CREAT|syscall.O_EXCL|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	buf := make([]byte, min(f.Size, 64<<10))
	for left := f.Size; left > 0; left -= len(buf) {
		buf = buf[:min(len(buf), left)]
		if err := readFull(buf); err != nil {
			return err
		}
		if err := writeFull(fd, buf); err != nil {
			return err
		}
	}
	if err := syscall.Fchmod(fd, f.Mode); err != nil {
		return err
	}
	return syscall.Close(fd)
}

func writeFull(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := syscall.Write(fd, b)
		if err != nil && err != syscall.EINTR {
			return err
		}
		b = b[max(n, 0):]
	}
	return nil
}

type failed string

func (f failed) Error() string { return string(f) }

func failure(what string, err error) error { return failed(what + ": " + err.Error()) }

func say(text string) { _ = writeFull(2, []byte(text)) }

// merge puts variables over those that there are.
func merge(base, over []string) []string {
	given := make(map[string]bool, len(over))
	for _, v := range over {
		name, _, _ := strings.Cut(v, "=")
		given[name] = true
	}
	env := make([]string, 0, len(base)+len(over))
	for _, v := range base {
		if name, _, ok := strings.Cut(v, "="); ok && !given[name] {
			env = append(env, v)
		}
	}
	return append(env, over...)
}

// become executes the program, found as the C library's execvp does it, which is
// what the engine's init process uses. It returns only with an error.
func become(argv, env []string) error {
	if strings.Contains(argv[0], "/") {
		return execute(argv[0], argv, env)
	}
	path := "/bin:/usr/bin"
	for _, v := range env {
		if p, ok := strings.CutPrefix(v, "PATH="); ok {
			path = p
		}
	}
	denied := false
	for dir := range strings.SplitSeq(path, ":") {
		file := argv[0]
		if dir != "" {
			file = dir + "/" + file
		}
		switch err := execute(file, argv, env); err {
		case syscall.EACCES:
			denied = true
		case syscall.ENOENT, syscall.ENOTDIR, syscall.ESTALE, syscall.ENODEV, syscall.ETIMEDOUT:
		default:
			return err
		}
	}
	if denied {
		return syscall.EACCES
	}
	return syscall.ENOENT
}

// execute runs a file without a format that is known as a script of the shell.
func execute(file string, argv, env []string) error {
	err := syscall.Exec(file, argv, env)
	if err == syscall.ENOEXEC {
		err = syscall.Exec("/bin/sh", append([]string{"/bin/sh", file}, argv[1:]...), env)
	}
	return err
}

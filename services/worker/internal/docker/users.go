package docker

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"strconv"
	"strings"
	"sync"
)

// owner is a user of an image by numbers.
type owner struct{ uid, gid int }

// users remembers what user names mean in an image.
type users struct {
	mu     sync.Mutex
	byName map[string]owner // by image id and "user[:group]"
}

const maxKnownUsers = 1000

// errNoSuchUser means that an image's /etc/passwd does not say who a user is.
var errNoSuchUser = errors.New("the image's /etc/passwd does not name the user")

// known gives a user by numbers, where that needs no look into the image. The
// group of a user that is a number alone is the engine's choice; for files it is
// the same number.
func (u *users) known(image, user string) (owner, bool) {
	name, group, _ := strings.Cut(user, ":")
	if uid, err := strconv.ParseUint(name, 10, 31); err == nil {
		gid, err := strconv.ParseUint(group, 10, 31)
		if err != nil {
			gid = uid
		}
		return owner{int(uid), int(gid)}, true
	}
	if name == "root" {
		return owner{}, true
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	found, ok := u.byName[image+"\x00"+user]
	return found, ok
}

// learn reads in a container of the image what number a user's name has.
func (u *users) learn(ctx context.Context, e *engine, image, container, user string) (owner, error) {
	name, group, _ := strings.Cut(user, ":")
	passwd, err := e.readFile(ctx, container, "/etc/passwd")
	if gone(err) {
		err = errNoSuchUser
	}
	if err != nil {
		return owner{}, err
	}
	found, ok := lookUp(passwd, name)
	if !ok {
		return owner{}, errNoSuchUser
	}
	if gid, err := strconv.ParseUint(group, 10, 31); err == nil {
		found.gid = int(gid)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.byName == nil || len(u.byName) >= maxKnownUsers {
		u.byName = map[string]owner{}
	}
	u.byName[image+"\x00"+user] = found
	return found, nil
}

// mayRun reports whether the image's own user may run jobs: it is not root, as
// far as is known, and is written in a way that is understood.
func (x *Executor) mayRun(img *imageFacts) bool {
	if isRoot(img.user) || !safeUser.MatchString(img.user) {
		return false
	}
	found, known := x.users.known(img.id, img.user)
	return !known || found.uid != 0
}

// lookUp reads passwd lines for a user by name or number.
func lookUp(passwd []byte, name string) (owner, bool) {
	for line := range strings.Lines(string(passwd)) {
		fields := strings.Split(strings.TrimSpace(line), ":")
		if len(fields) < 4 || fields[0] != name {
			continue
		}
		uid, err1 := strconv.Atoi(fields[2])
		gid, err2 := strconv.Atoi(fields[3])
		if err1 == nil && err2 == nil && uid >= 0 && gid >= 0 {
			return owner{uid, gid}, true
		}
	}
	return owner{}, false
}

// readFile reads a small file of a container that need not run.
func (e *engine) readFile(ctx context.Context, id, file string) ([]byte, error) {
	ctx, cancel := e.call(ctx)
	defer cancel()
	body, _, err := e.api.CopyFromContainer(ctx, id, file)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	r := tar.NewReader(body)
	h, err := r.Next()
	if err != nil {
		return nil, err
	}
	if h.Typeflag != tar.TypeReg || h.Size > 1<<20 {
		return nil, errNoSuchUser
	}
	return io.ReadAll(io.LimitReader(r, 1<<20))
}

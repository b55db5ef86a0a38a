//go:build unix

package process

import (
	"fmt"
	"math"
	"os"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"github.com/cmdexec/cmdexec/services/worker/internal/executor"
)

// credential turns "user", "uid", "user:group" or "uid:gid" into ids. Nil means
// the worker's own. A uid without an account is its own group. Only root may
// become somebody else.
func credential(name string) (*syscall.Credential, error) {
	if name == "" {
		return nil, nil
	}
	userName, groupName, withGroup := strings.Cut(name, ":")
	cred := &syscall.Credential{}
	account, err := user.Lookup(userName)
	if err != nil {
		if _, numeric := parseID(userName); numeric {
			account, err = user.LookupId(userName)
		}
	}
	if err == nil {
		uid, okUID := parseID(account.Uid)
		gid, okGID := parseID(account.Gid)
		if !okUID || !okGID {
			return nil, executor.InfraError(fmt.Sprintf("user %q has no numeric ids", userName), nil)
		}
		cred.Uid, cred.Gid = uid, gid
		groups, err := account.GroupIds()
		if err == nil {
			for _, g := range groups {
				if id, ok := parseID(g); ok {
					cred.Groups = append(cred.Groups, id)
				}
			}
		}
	} else {
		uid, numeric := parseID(userName)
		if !numeric {
			return nil, executor.UserError(fmt.Sprintf("user %q does not exist on this worker", userName), nil)
		}
		cred.Uid, cred.Gid = uid, uid
	}
	if withGroup {
		gid, numeric := parseID(groupName)
		if group, err := user.LookupGroup(groupName); err == nil {
			if gid, numeric = parseID(group.Gid); !numeric {
				return nil, executor.InfraError(fmt.Sprintf("group %q has no numeric id", groupName), nil)
			}
		} else if !numeric {
			return nil, executor.UserError(fmt.Sprintf("group %q does not exist on this worker", groupName), nil)
		}
		cred.Gid, cred.Groups = gid, nil
	}
	switch euid := os.Geteuid(); {
	case euid == int(cred.Uid) && os.Getegid() == int(cred.Gid):
		return nil, nil
	case euid != 0:
		return nil, executor.InfraError(fmt.Sprintf("this worker does not run as root and cannot start commands as user %q", name), nil)
	}
	return cred, nil
}

func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	// The highest id means "unchanged" to the kernel.
	return uint32(n), err == nil && n < math.MaxUint32
}

package process

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// unmountBelow detaches every mount below folder, newest first, and fails where
// one stays.
func unmountBelow(folder string) error {
	for _, point := range mountsBelow(folder) {
		_ = unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	if left := mountsBelow(folder); len(left) > 0 {
		return fmt.Errorf("%d mounts in it cannot be detached", len(left))
	}
	return nil
}

func mountsBelow(folder string) []string {
	mounts, err := readMounts()
	if err != nil {
		return nil
	}
	var points []string
	for i := len(mounts) - 1; i >= 0; i-- {
		if point := mounts[i].point; point == folder || strings.HasPrefix(point, folder+"/") {
			points = append(points, point)
		}
	}
	return points
}

// forbiddingFlags are FS_IMMUTABLE_FL and FS_APPEND_FL, which have the bits of
// the attributes.
const forbiddingFlags = unix.STATX_ATTR_IMMUTABLE | unix.STATX_ATTR_APPEND

// clearFlags takes the immutable and append-only flags of ext4 and its like
// away, which only root can set and which refuse removal even to root.
func clearFlags(parent *os.Root, name string) {
	f, err := parent.Open(name)
	if err != nil {
		return
	}
	defer f.Close()
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil || flags&forbiddingFlags == 0 {
		return
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags&^forbiddingFlags); err != nil && !errors.Is(err, unix.ENOTTY) {
		return
	}
}

// plain reports whether a folder has no extended attributes and none of the
// flags that clearFlags takes away.
func plain(fd int) bool {
	n, err := unix.Flistxattr(fd, nil)
	if n > 0 || (err != nil && !errors.Is(err, unix.ENOTSUP)) {
		return false
	}
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	return err != nil || flags&forbiddingFlags == 0
}

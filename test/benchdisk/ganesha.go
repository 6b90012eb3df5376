//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-backup/holdfast/fs/nfs"
	"github.com/holdfast-backup/holdfast/fs/nfs/folder"
	"github.com/holdfast-backup/holdfast/test/command"
)

// ganeshaPackages are those of Debian 12 that nfs-ganesha needs besides what is there. They are unpacked, not installed: that would start servers.
var ganeshaPackages = []string{"nfs-ganesha", "nfs-ganesha-vfs", "libntirpc4.3", "libnfsidmap1", "libwbclient0"}

// ganesha is nfs-ganesha, which serves dir. All that is started from here on is in a network of its own.
func (b *bench) ganesha(ctx context.Context, dir string) (nfsServer, error) {
	root := filepath.Join(b.dir, "ganesha")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nfsServer{}, err
	}
	get := command.Command{Args: append([]string{"apt-get", "-q", "-o", "APT::Sandbox::User=root", "download"}, ganeshaPackages...), Dir: root}
	if _, err := get.Run(ctx); err != nil {
		return nfsServer{}, err
	}
	debs, err := filepath.Glob(filepath.Join(root, "*.deb"))
	if err != nil {
		return nfsServer{}, err
	}
	for _, deb := range debs {
		if _, err := command.Run(ctx, "dpkg-deb", "-x", deb, root); err != nil {
			return nfsServer{}, err
		}
	}
	conf := filepath.Join(root, "ganesha.conf")
	libs := filepath.Join(root, "usr/lib/x86_64-linux-gnu")
	if err := os.WriteFile(conf, fmt.Appendf(nil, ganeshaConf, nfsPort, mountPort, libs, dir), 0o600); err != nil {
		return nfsServer{}, err
	}
	if err := ownNetwork(); err != nil {
		return nfsServer{}, err
	}
	if err := sayYes(ctx, "/run/rpcbind.sock"); err != nil {
		return nfsServer{}, err
	}
	run := command.Command{
		Args: []string{filepath.Join(root, "usr/bin/ganesha.nfsd"), "-F", "-f", conf, "-L", filepath.Join(root, "log"), "-p", filepath.Join(root, "pid"), "-N", "EVENT"},
		Env:  []string{"LD_LIBRARY_PATH=" + libs + ":" + filepath.Join(root, "usr/lib/ganesha")},
	}
	return nfsServer{name: "nfs-ganesha", export: dir, mount: mountPort, start: run.Start}, nil
}

// The ports, where its modules are and what it serves are filled in.
const ganeshaConf = `NFS_CORE_PARAM {
	Protocols = 3; NFS_Port = %d; MNT_Port = %d; Plugins_Dir = "%s/ganesha";
	Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; mount_path_pseudo = false;
}
NFSV4 { Graceless = true; Only_Numeric_Owners = true; UseGetpwnam = true; }
DIRECTORY_SERVICES { DomainName = "localdomain"; }
EXPORT {
	Export_Id = 1; Path = "%s"; Pseudo = /plain; Filesystem_id = 1.1; Protocols = 3; Transports = TCP;
	Access_Type = RW; Squash = No_Root_Squash; SecType = sys, none;
	FSAL { Name = VFS; }
}
`

// ownNetwork gives this goroutine, and what it starts, a network of its own and another /run: there the ports are free, and a socket
// of the system's rpcbind is not met.
func ownNetwork() error {
	runtime.LockOSThread() // for good
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}

// sayYes is a portmapper that agrees to everything and knows nothing (RFC 1833 §2.2.1, RFC 5531 §9): nfs-ganesha does not run without one, and
// nobody here asks it for a port.
func sayYes(ctx context.Context, socket string) error {
	ln, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { ln.Close() })
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer nc.Close()
				for agree(nc) == nil {
				}
			}()
		}
	}()
	return nil
}

// agree answers one call with TRUE.
func agree(nc net.Conn) error {
	be := binary.BigEndian
	var mark [4]byte
	if _, err := io.ReadFull(nc, mark[:]); err != nil {
		return err
	}
	const last, most = 1 << 31, 4 << 10
	n := be.Uint32(mark[:]) &^ last
	if n < 4 || n > most {
		return errors.New("no call")
	}
	call := make([]byte, n)
	if _, err := io.ReadFull(nc, call); err != nil {
		return err
	}
	reply := be.AppendUint32(nil, last|7*4)
	reply = append(reply, call[:4]...)                // the call's number
	for _, v := range [...]uint32{1, 0, 0, 0, 0, 1} { // reply, accepted, no verifier, success, TRUE
		reply = be.AppendUint32(reply, v)
	}
	_, err := nc.Write(reply)
	return err
}

// folder is Holdfast's server over the plain file, which nfs-ganesha serves, too: what the protocol takes without the point.
func (b *bench) folder() nfsServer {
	return nfsServer{name: "folder", export: "/plain", mount: nfsPort, start: func(ctx context.Context) (*command.Process, error) {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		return b.start(ctx, self, "--serve", filepath.Join(b.dir, "plain"))
	}}
}

// serveFolder serves a folder until it is told to end.
func serveFolder(ctx context.Context, dir string) (err error) {
	f, err := folder.Open(dir, nil, folder.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	s := &nfs.Server{Log: func(err error) { fmt.Fprintln(os.Stderr, err) }}
	if err := s.Export(nfs.Export{Path: "/plain", ID: 1, FS: f, Writable: true, NoRootSquash: true}); err != nil {
		return err
	}
	if err := s.Listen("127.0.0.1:" + strconv.Itoa(nfsPort)); err != nil {
		return err
	}
	return s.Serve(ctx)
}

// listens waits until a port is open.
func listens(ctx context.Context, p *command.Process, port int) error {
	var d net.Dialer
	for range 1000 {
		// In the network of this goroutine: a dialer of a name would start others.
		nc, err := d.DialContext(ctx, "tcp", "127.0.0.1:"+strconv.Itoa(port))
		if err == nil {
			return nc.Close()
		}
		if ended, err := p.Ended(); ended {
			return errors.Join(errors.New("the server ended"), err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return errors.New("the server does not listen")
}

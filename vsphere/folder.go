package vsphere

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/holdfast-backup/holdfast/fs/vdisk"
)

// place is a file on a datastore, as "[datastore] path" names it.
type place struct{ datastore, path string }

func parsePlace(s string) (place, error) {
	var p object.DatastorePath
	if !p.FromString(s) || p.Datastore == "" {
		return place{}, fmt.Errorf("%q names no file on a datastore", s)
	}
	return place{p.Datastore, p.Path}, nil
}

// beside is another file in the same folder.
func (p place) beside(name string) place {
	return place{p.datastore, path.Join(path.Dir(p.path), name)}
}

func (p place) String() string { return "[" + p.datastore + "] " + p.path }

// datacenter is the path in the inventory of the datacenter that a VM is in: names of datastores are unique only there.
func (s *Source) datacenter(ctx context.Context, vm types.ManagedObjectReference) (string, error) {
	up, err := mo.Ancestors(ctx, s.c, s.c.ServiceContent.PropertyCollector, vm)
	if err != nil {
		return "", err
	}
	out := ""
	for _, e := range up {
		if e.Self == s.c.ServiceContent.RootFolder {
			continue
		}
		out += "/" + e.Name
		if e.Self.Type == "Datacenter" {
			return out, nil
		}
	}
	return "", errors.New("it is in no datacenter")
}

// remoteFile reads a file on a datastore over HTTPS: vSphere Web Services SDK Programming Guide, "Using HTTP Access to vSphere Server Files".
// Safe for concurrent use.
type remoteFile struct {
	src  *Source
	ctx  context.Context // of the run
	url  *url.URL
	name string
	size int64
}

func (s *Source) fileURL(dc string, p place) *url.URL {
	return object.NewDatastoreURL(*s.c.URL(), dc, p.datastore, p.path)
}

// openFile finds out how large a file is.
func (s *Source) openFile(ctx context.Context, dc string, p place) (*remoteFile, error) {
	f := &remoteFile{src: s, ctx: ctx, url: s.fileURL(dc, p), name: p.String()}
	err := f.retried(func() error {
		res, err := f.do(http.MethodHead, "")
		if err != nil {
			return err
		}
		res.Body.Close()
		if res.StatusCode != http.StatusOK {
			return statusError(res)
		}
		if f.size = res.ContentLength; f.size < 0 {
			return final{errors.New("the server does not say how large it is")}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.name, err)
	}
	return f, nil
}

// Reading one piece of a file is tried so often without a byte more, after pauses that double from the first one.
const (
	readAttempts = 6
	readPause    = 500 * time.Millisecond
	readTime     = 2 * time.Minute // of one attempt
)

// final is an error that another attempt does not mend.
type final struct{ error }

func (f final) Unwrap() error { return f.error }

// retried calls f until it succeeds or there is no hope.
func (f *remoteFile) retried(call func() error) error {
	pause := readPause
	for n := 1; ; n++ {
		err := call()
		var stop final
		if err == nil || n == readAttempts || errors.As(err, &stop) || f.ctx.Err() != nil {
			return errors.Join(err, f.ctx.Err())
		}
		f.src.logf("%s: %v; trying again", f.name, err)
		if err := f.src.cfg.Sleep(f.ctx, pause); err != nil {
			return err
		}
		pause *= 2
	}
}

// ReadAt implements io.ReaderAt. When the connection ends in the middle it goes on at the byte where it was.
func (f *remoteFile) ReadAt(p []byte, off int64) (int, error) {
	if off >= f.size {
		return 0, io.EOF
	}
	want := p[:min(int64(len(p)), f.size-off)]
	n := 0
	for n < len(want) {
		err := f.retried(func() error {
			k, err := f.readPart(want[n:], off+int64(n))
			n += k
			if k > 0 && n < len(want) {
				return nil // as many attempts again
			}
			return err
		})
		if err != nil && n < len(want) {
			return n, fmt.Errorf("%s at byte %d: %w", f.name, off+int64(n), err)
		}
	}
	if len(want) < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// readPart reads what one answer has of p.
func (f *remoteFile) readPart(p []byte, off int64) (int, error) {
	res, err := f.do(http.MethodGet, fmt.Sprintf("bytes=%d-%d", off, off+int64(len(p))-1))
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusPartialContent {
		return 0, statusError(res)
	}
	var from, to, size int64
	if _, err := fmt.Sscanf(res.Header.Get("Content-Range"), "bytes %d-%d/%d", &from, &to, &size); err != nil || from != off || size != f.size {
		return 0, fmt.Errorf("the server was asked for byte %d of %d and answers %q", off, f.size, res.Header.Get("Content-Range"))
	}
	return io.ReadFull(res.Body, p)
}

// do makes a request within the limits, with a session that is alive.
func (f *remoteFile) do(method, ranges string) (*http.Response, error) {
	if err := f.src.c.enter(f.ctx); err != nil {
		return nil, err
	}
	for n := 1; ; n++ {
		began := time.Now()
		ctx, cancel := context.WithTimeout(f.ctx, readTime)
		req, err := http.NewRequestWithContext(ctx, method, f.url.String(), nil)
		if err != nil {
			cancel()
			f.src.c.leave()
			return nil, err
		}
		if ranges != "" {
			req.Header.Set("Range", ranges)
		}
		res, err := f.src.c.Client.Client.Client.Do(req)
		if err == nil && res.StatusCode == http.StatusUnauthorized && n < attempts {
			res.Body.Close()
			cancel()
			if err := f.src.c.logInAgain(f.ctx, began); err != nil {
				f.src.c.leave()
				return nil, final{err}
			}
			continue
		}
		if err != nil {
			cancel()
			f.src.c.leave()
			return nil, err
		}
		res.Body = &answer{ReadCloser: res.Body, done: func() { cancel(); f.src.c.leave() }}
		return res, nil
	}
}

// answer ends its request when it is closed.
type answer struct {
	io.ReadCloser
	done func()
}

func (a *answer) Close() error {
	defer a.done()
	return a.ReadCloser.Close()
}

// statusError says what an answer means that is not what was wanted. One of the server's own trouble may go away.
func statusError(res *http.Response) error {
	err := errors.New(res.Status)
	switch res.StatusCode {
	case http.StatusOK: // it takes no notice of the range, as a proxy between may do
		return err
	case http.StatusNotFound:
		return final{fmt.Errorf("%w: %w", fs.ErrNotExist, err)}
	case http.StatusUnauthorized, http.StatusForbidden:
		return final{fmt.Errorf("%w: %w: Datastore.Browse and Datastore.FileManagement are needed", ErrNoPrivilege, err)}
	}
	if res.StatusCode < 500 {
		return final{err}
	}
	return err
}

// folderReader reads the files of a disk over HTTPS.
type folderReader struct{ *vdisk.VMDKImage }

// Via implements reader.
func (folderReader) Via() string { return "folder" }

// Close implements reader.
func (folderReader) Close() error { return nil }

// openFolder opens a disk by its descriptor, with all that it is over.
func (s *Source) openFolder(ctx context.Context, dc string, dev *device) (reader, error) {
	links := chainOf(dev.backing)
	img, err := s.openLink(ctx, dc, links)
	if err != nil {
		return nil, err
	}
	if img.Size() != dev.size {
		return nil, fmt.Errorf("%s holds a disk of %d bytes, but the VM has one of %d", dev.file, img.Size(), dev.size)
	}
	return folderReader{img}, nil
}

// openLink opens the first of links over the others.
func (s *Source) openLink(ctx context.Context, dc string, links []string) (*vdisk.VMDKImage, error) {
	at, err := parsePlace(links[0])
	if err != nil {
		return nil, err
	}
	f, err := s.openFile(ctx, dc, at)
	if err != nil {
		return nil, err
	}
	return vdisk.OpenVMDK(f, f.size, vdisk.VMDKOptions{
		Name: links[0],
		Extent: func(name string) (io.ReaderAt, int64, error) {
			if name == "" || strings.ContainsAny(name, "/\\") {
				return nil, 0, fmt.Errorf("%s names the file %q, which is not beside it", links[0], name)
			}
			f, err := s.openFile(ctx, dc, at.beside(name))
			if err != nil {
				return nil, 0, err
			}
			return f, f.size, nil
		},
		Parent: func(string) (*vdisk.VMDKImage, error) {
			if len(links) < 2 {
				return nil, fmt.Errorf("%s is over a disk that the host does not name", links[0])
			}
			return s.openLink(ctx, dc, links[1:])
		},
	})
}

// chainOf gives the files of a disk, the newest first.
func chainOf(b types.BaseVirtualDeviceBackingInfo) []string {
	var files []string
	for range maxDepth {
		switch v := b.(type) {
		case *types.VirtualDiskFlatVer2BackingInfo:
			files = append(files, v.FileName)
			if v.Parent == nil {
				return files
			}
			b = v.Parent
		case *types.VirtualDiskSeSparseBackingInfo:
			files = append(files, v.FileName)
			if v.Parent == nil {
				return files
			}
			b = v.Parent
		case *types.VirtualDiskSparseVer2BackingInfo:
			files = append(files, v.FileName)
			if v.Parent == nil {
				return files
			}
			b = v.Parent
		case *types.VirtualDiskRawDiskMappingVer1BackingInfo:
			files = append(files, v.FileName)
			if v.Parent == nil {
				return files
			}
			b = v.Parent
		default:
			return files
		}
	}
	return files
}

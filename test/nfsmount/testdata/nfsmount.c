/* Mounts an NFS export by libnfs, for tests: nfsmount URL MOUNTPOINT [FUSE options]. One request at a time, nothing cached. There is no flush: a process that
 * starts another one closes the files of the child, and must not wait for a server that is gone. */
#define FUSE_USE_VERSION 31
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/time.h>
#include <nfsc/libnfs.h>

static struct nfs_context *nfs;

static struct nfsfh *handle(struct fuse_file_info *fi) { return (struct nfsfh *)(uintptr_t)fi->fh; }

static int do_getattr(const char *path, struct stat *st, struct fuse_file_info *fi)
{
	struct nfs_stat_64 s;
	int rc = nfs_lstat64(nfs, path, &s);
	(void)fi;
	if (rc < 0)
		return rc;
	memset(st, 0, sizeof(*st));
	st->st_ino = s.nfs_ino;
	st->st_mode = s.nfs_mode;
	st->st_nlink = s.nfs_nlink;
	st->st_uid = s.nfs_uid;
	st->st_gid = s.nfs_gid;
	st->st_size = s.nfs_size;
	st->st_blocks = s.nfs_used / 512;
	st->st_blksize = 4096;
	st->st_atim.tv_sec = s.nfs_atime;
	st->st_mtim.tv_sec = s.nfs_mtime;
	st->st_ctim.tv_sec = s.nfs_ctime;
	return 0;
}

static int do_readdir(const char *path, void *buf, fuse_fill_dir_t fill, off_t off, struct fuse_file_info *fi, enum fuse_readdir_flags flags)
{
	struct nfsdir *dir;
	struct nfsdirent *e;
	int rc = nfs_opendir(nfs, path, &dir);
	(void)off, (void)fi, (void)flags;
	if (rc < 0)
		return rc;
	while ((e = nfs_readdir(nfs, dir)))
		fill(buf, e->name, NULL, 0, 0);
	nfs_closedir(nfs, dir);
	return 0;
}

static int do_open(const char *path, struct fuse_file_info *fi)
{
	struct nfsfh *fh;
	int rc = nfs_open(nfs, path, fi->flags & ~(O_CREAT | O_EXCL | O_APPEND), &fh);
	if (rc < 0)
		return rc;
	fi->fh = (uintptr_t)fh;
	fi->direct_io = 1;
	return 0;
}

static int do_create(const char *path, mode_t mode, struct fuse_file_info *fi)
{
	struct nfsfh *fh;
	int rc = nfs_create(nfs, path, O_RDWR | O_CREAT | (fi->flags & O_EXCL), mode, &fh);
	if (rc < 0)
		return rc;
	fi->fh = (uintptr_t)fh;
	fi->direct_io = 1;
	return 0;
}

static int do_read(const char *path, char *buf, size_t n, off_t off, struct fuse_file_info *fi)
{
	(void)path;
	return nfs_pread(nfs, handle(fi), off, n, buf);
}

static int do_write(const char *path, const char *buf, size_t n, off_t off, struct fuse_file_info *fi)
{
	(void)path;
	return nfs_pwrite(nfs, handle(fi), off, n, (char *)buf);
}

static int do_fsync(const char *path, int datasync, struct fuse_file_info *fi)
{
	(void)path, (void)datasync;
	return nfs_fsync(nfs, handle(fi));
}

static int do_release(const char *path, struct fuse_file_info *fi)
{
	(void)path;
	return nfs_close(nfs, handle(fi));
}

static int do_truncate(const char *path, off_t size, struct fuse_file_info *fi)
{
	(void)fi;
	return nfs_truncate(nfs, path, size);
}

static int do_utimens(const char *path, const struct timespec tv[2], struct fuse_file_info *fi)
{
	struct timeval t[2];
	(void)fi;
	for (int i = 0; i < 2; i++) {
		if (tv[i].tv_nsec == UTIME_NOW || tv[i].tv_nsec == UTIME_OMIT) {
			gettimeofday(&t[i], NULL);
		} else {
			t[i].tv_sec = tv[i].tv_sec;
			t[i].tv_usec = tv[i].tv_nsec / 1000;
		}
	}
	return nfs_utimes(nfs, path, t);
}

static int do_chmod(const char *path, mode_t mode, struct fuse_file_info *fi)
{
	(void)fi;
	return nfs_chmod(nfs, path, mode);
}

static int do_mkdir(const char *path, mode_t mode)
{
	(void)mode;
	return nfs_mkdir(nfs, path);
}

static int do_unlink(const char *path) { return nfs_unlink(nfs, path); }
static int do_rmdir(const char *path) { return nfs_rmdir(nfs, path); }

static int do_rename(const char *from, const char *to, unsigned flags) { return flags ? -EINVAL : nfs_rename(nfs, from, to); }

static int do_statfs(const char *path, struct statvfs *st) { return nfs_statvfs(nfs, path, st); }

static const struct fuse_operations operations = {
	.getattr = do_getattr, .readdir = do_readdir, .open = do_open, .create = do_create, .read = do_read, .write = do_write,
	.fsync = do_fsync, .release = do_release, .truncate = do_truncate, .utimens = do_utimens, .chmod = do_chmod,
	.mkdir = do_mkdir, .unlink = do_unlink, .rmdir = do_rmdir, .rename = do_rename, .statfs = do_statfs,
};

int main(int argc, char **argv)
{
	struct nfs_url *url;
	if (argc < 3) {
		fprintf(stderr, "usage: nfsmount URL MOUNTPOINT [FUSE options]\n");
		return 64;
	}
	nfs = nfs_init_context();
	url = nfs_parse_url_dir(nfs, argv[1]);
	if (!url || nfs_mount(nfs, url->server, url->path)) {
		fprintf(stderr, "nfsmount: %s: %s\n", argv[1], nfs_get_error(nfs));
		return 1;
	}
	nfs_set_autoreconnect(nfs, -1);
	argv[1] = argv[0];
	return fuse_main(argc - 1, argv + 1, &operations, NULL);
}

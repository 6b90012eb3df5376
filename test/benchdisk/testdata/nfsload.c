/* Loads an NFS server through libnfs's asynchronous interface, over one connection, and prints as JSON what it took:
 *
 *     nfsload HOST NFSPORT MOUNTPORT EXPORT FILE WORK BLOCK DEPTH SECONDS OFFSETS
 *
 * WORK is read, check (read, and sum up what came), write (UNSTABLE, and one COMMIT in the end, which is in the time), sync (FILE_SYNC each) or fsync
 * (UNSTABLE and COMMIT each). OFFSETS is a file of u64, little-endian: where to read or write, in this order, DEPTH blocks at a time. It ends
 * after SECONDS, or at the end of the list when they are 0. */
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/resource.h>
#include <time.h>
#include <nfsc/libnfs.h>
#include <nfsc/libnfs-raw.h>
#include <nfsc/libnfs-raw-mount.h>
#include <nfsc/libnfs-raw-nfs.h>

enum work { READ, CHECK, WRITE, SYNC, FSYNC };
static const char *const works[] = { "read", "check", "write", "sync", "fsync" };

struct slot { uint64_t off; };

static struct rpc_context *rpc;
static nfs_fh3 file;
static enum work work;
static uint32_t block, depth, rtmax, wtmax;
static double seconds;
static const uint64_t *offsets;
static size_t count, at;
static uint64_t ops, sum;
static int flying, waiting;
static double began;
static char *data;
static int verified;
static writeverf3 verifier;

static void die(const char *what, const char *why)
{
	fprintf(stderr, "nfsload: %s: %s\n", what, why ? why : "?");
	exit(1);
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static char *copy(const char *p, size_t n)
{
	char *q = malloc(n + 1);
	if (!q)
		die("memory", strerror(errno));
	memcpy(q, p, n);
	q[n] = 0;
	return q;
}

/* serve handles the context until *left is 0. */
static void serve(struct rpc_context *c, const int *left)
{
	while (*left) {
		struct pollfd p = { .fd = rpc_get_fd(c), .events = rpc_which_events(c) };
		if (poll(&p, 1, 10000) < 1)
			die("no answer", rpc_get_error(c));
		if (rpc_service(c, p.revents) < 0)
			die("connection", rpc_get_error(c));
	}
}

static void reply(int status, void *res, const char *what)
{
	if (status != RPC_STATUS_SUCCESS)
		die(what, status == RPC_STATUS_ERROR ? res : "cancelled");
}

static void refused(int status, const char *what)
{
	if (status != NFS3_OK)
		die(what, nfsstat3_to_str(status));
}

static void on_connect(struct rpc_context *c, int status, void *res, void *arg)
{
	(void)c, (void)arg;
	reply(status, res, "connect");
	waiting = 0;
}

static struct rpc_context *join(const char *host, int port, int program, int version)
{
	struct rpc_context *c = rpc_init_context();
	waiting = 1;
	if (!c || rpc_connect_port_async(c, host, port, program, version, on_connect, NULL))
		die("connect", c ? rpc_get_error(c) : NULL);
	serve(c, &waiting);
	return c;
}

static void on_mount(struct rpc_context *c, int status, void *res, void *arg)
{
	mountres3 *m = res;
	nfs_fh3 *fh = arg;
	(void)c;
	reply(status, res, "MNT");
	if (m->fhs_status != MNT3_OK)
		die("MNT", mountstat3_to_str(m->fhs_status));
	fh->data.data_len = m->mountres3_u.mountinfo.fhandle.fhandle3_len;
	fh->data.data_val = copy(m->mountres3_u.mountinfo.fhandle.fhandle3_val, fh->data.data_len);
	waiting = 0;
}

static void on_lookup(struct rpc_context *c, int status, void *res, void *arg)
{
	LOOKUP3res *l = res;
	(void)c, (void)arg;
	reply(status, res, "LOOKUP");
	refused(l->status, "LOOKUP");
	file.data.data_len = l->LOOKUP3res_u.resok.object.data.data_len;
	file.data.data_val = copy(l->LOOKUP3res_u.resok.object.data.data_val, file.data.data_len);
	waiting = 0;
}

static void on_fsinfo(struct rpc_context *c, int status, void *res, void *arg)
{
	FSINFO3res *f = res;
	(void)c, (void)arg;
	reply(status, res, "FSINFO");
	refused(f->status, "FSINFO");
	rtmax = f->FSINFO3res_u.resok.rtmax;
	wtmax = f->FSINFO3res_u.resok.wtmax;
	waiting = 0;
}

/* A restart of the server, or a write that was lost, would make the figures wrong. */
static void same(const char *verf)
{
	if (verified && memcmp(verf, verifier, sizeof(verifier)))
		die("write", "the verifier changed");
	memcpy(verifier, verf, sizeof(verifier));
	verified = 1;
}

static void commit(rpc_cb cb, void *arg)
{
	COMMIT3args args = { .file = file };
	if (rpc_nfs3_commit_async(rpc, cb, &args, arg))
		die("COMMIT", rpc_get_error(rpc));
}

static void next(struct slot *s);

static void done(struct slot *s)
{
	ops++;
	flying--;
	next(s);
}

static void on_commit(struct rpc_context *c, int status, void *res, void *arg)
{
	COMMIT3res *r = res;
	(void)c;
	reply(status, res, "COMMIT");
	refused(r->status, "COMMIT");
	same(r->COMMIT3res_u.resok.verf);
	if (arg)
		done(arg);
	else
		flying--;
}

static void on_write(struct rpc_context *c, int status, void *res, void *arg)
{
	WRITE3res *w = res;
	(void)c;
	reply(status, res, "WRITE");
	refused(w->status, "WRITE");
	if (w->WRITE3res_u.resok.count != block)
		die("WRITE", "short");
	if (work == SYNC && w->WRITE3res_u.resok.committed != FILE_SYNC)
		die("WRITE", "not stable");
	same(w->WRITE3res_u.resok.verf);
	if (work == FSYNC)
		commit(on_commit, arg);
	else
		done(arg);
}

static void on_read(struct rpc_context *c, int status, void *res, void *arg)
{
	READ3res *r = res;
	struct slot *s = arg;
	(void)c;
	reply(status, res, "READ");
	refused(r->status, "READ");
	if (r->READ3res_u.resok.data.data_len != block)
		die("READ", "short");
	if (work == CHECK) {
		uint64_t h = s->off, w;
		for (uint32_t i = 0; i + 8 <= block; i += 8) {
			memcpy(&w, r->READ3res_u.resok.data.data_val + i, 8);
			h = (h ^ w) * 0x9e3779b97f4a7c15u;
			h ^= h >> 29;
		}
		sum += h; /* replies come in any order */
	}
	done(s);
}

/* next sends the next call, unless it is over. */
static void next(struct slot *s)
{
	if (seconds ? now() - began >= seconds : at == count)
		return;
	s->off = offsets[at++ % count];
	flying++;
	if (work == READ || work == CHECK) {
		READ3args args = { .file = file, .offset = s->off, .count = block };
		if (rpc_nfs3_read_async(rpc, on_read, &args, s))
			die("READ", rpc_get_error(rpc));
	} else {
		WRITE3args args = { .file = file, .offset = s->off, .count = block, .stable = work == SYNC ? FILE_SYNC : UNSTABLE, .data = { block, data } };
		if (rpc_nfs3_write_async(rpc, on_write, &args, s))
			die("WRITE", rpc_get_error(rpc));
	}
}

static void list(const char *name)
{
	struct stat st;
	FILE *f = fopen(name, "rb");
	uint64_t *p;
	if (!f || fstat(fileno(f), &st) || !(p = malloc(st.st_size + 8)))
		die(name, strerror(errno));
	count = st.st_size / 8;
	if (!count || fread(p, 8, count, f) != count)
		die(name, "no offsets");
	fclose(f);
	offsets = p;
}

int main(int argc, char **argv)
{
	struct rpc_context *m;
	struct slot *slots;
	struct rusage ru;
	nfs_fh3 root = { { 0, NULL } };
	double took;
	if (argc != 11) {
		fprintf(stderr, "usage: nfsload HOST NFSPORT MOUNTPORT EXPORT FILE WORK BLOCK DEPTH SECONDS OFFSETS\n");
		return 64;
	}
	while (work <= FSYNC && strcmp(argv[6], works[work]))
		work++;
	block = atoi(argv[7]);
	depth = atoi(argv[8]);
	seconds = atof(argv[9]);
	if (work > FSYNC || !block || !depth)
		die("arguments", "no such work, block or depth");
	list(argv[10]);
	if (!(slots = calloc(depth, sizeof(*slots))) || !(data = malloc(block)))
		die("memory", strerror(errno));
	srandom(time(NULL));
	for (uint32_t i = 0; i < block; i++)
		data[i] = random();

	m = join(argv[1], atoi(argv[3]), MOUNT_PROGRAM, MOUNT_V3);
	waiting = 1;
	if (rpc_mount3_mnt_async(m, on_mount, argv[4], &root))
		die("MNT", rpc_get_error(m));
	serve(m, &waiting);
	rpc_destroy_context(m);

	rpc = join(argv[1], atoi(argv[2]), NFS_PROGRAM, NFS_V3);
	waiting = 1;
	LOOKUP3args look = { .what = { .dir = root, .name = argv[5] } };
	if (rpc_nfs3_lookup_async(rpc, on_lookup, &look, NULL))
		die("LOOKUP", rpc_get_error(rpc));
	serve(rpc, &waiting);
	waiting = 1;
	FSINFO3args info = { .fsroot = root };
	if (rpc_nfs3_fsinfo_async(rpc, on_fsinfo, &info, NULL))
		die("FSINFO", rpc_get_error(rpc));
	serve(rpc, &waiting);
	if (block > (work <= CHECK ? rtmax : wtmax))
		die("FSINFO", "the server takes no blocks of that size");

	began = now();
	for (uint32_t i = 0; i < depth; i++)
		next(&slots[i]);
	serve(rpc, &flying);
	if (work == WRITE) {
		flying++;
		commit(on_commit, NULL);
		serve(rpc, &flying);
	}
	took = now() - began;
	getrusage(RUSAGE_SELF, &ru);
	printf("{\"ops\":%llu,\"seconds\":%.6f,\"sum\":\"%016llx\",\"cpu\":%.6f}\n", (unsigned long long)ops, took, (unsigned long long)sum,
		ru.ru_utime.tv_sec + ru.ru_stime.tv_sec + (ru.ru_utime.tv_usec + ru.ru_stime.tv_usec) / 1e6);
	return 0;
}

// Package nfs serves file systems to hypervisors and other clients by NFS version 3.
package nfs

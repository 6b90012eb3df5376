package guesttest

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// protect makes what ext4 encrypts, a directory "secret" with files and links, and a file "verity" that it signs.
func protect(dir string) error {
	secret := dir + "/secret"
	if err := errors.Join(os.Mkdir(secret, 0o750), encrypt(secret)); err != nil {
		return err
	}
	err := errors.Join(os.WriteFile(secret+"/file", make([]byte, 10000), 0o600), os.Mkdir(secret+"/dir", 0o700), os.Symlink("file", secret+"/link"),
		os.WriteFile(dir+"/verity", []byte("begins "+string(make([]byte, 300_000))), 0o644))
	f, err2 := os.Open(dir + "/verity")
	if err = errors.Join(err, err2); err != nil {
		return err
	}
	defer f.Close()
	// struct fsverity_enable_arg (linux/fsverity.h): version 1, SHA-256 over blocks of 4096 bytes.
	arg := [32]uint32{1, 1, 4096}
	return ioctl(f, unix.FS_IOC_ENABLE_VERITY, unsafe.Pointer(&arg))
}

// encrypt makes an empty directory one whose names and contents are encrypted (Linux, filesystems/fscrypt).
func encrypt(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	key := struct {
		arg unix.FscryptAddKeyArg
		raw [64]byte
	}{arg: unix.FscryptAddKeyArg{Key_spec: unix.FscryptKeySpecifier{Type: unix.FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER}, Raw_size: 64}}
	copy(key.raw[:], "a key of a test")
	if err := ioctl(d, unix.FS_IOC_ADD_ENCRYPTION_KEY, unsafe.Pointer(&key)); err != nil {
		return err
	}
	policy := unix.FscryptPolicyV2{Version: unix.FSCRYPT_POLICY_V2, Contents_encryption_mode: unix.FSCRYPT_MODE_AES_256_XTS,
		Filenames_encryption_mode: unix.FSCRYPT_MODE_AES_256_CTS, Flags: unix.FSCRYPT_POLICY_FLAGS_PAD_16}
	copy(policy.Master_key_identifier[:], key.arg.Key_spec.U[:])
	return ioctl(d, unix.FS_IOC_SET_ENCRYPTION_POLICY, unsafe.Pointer(&policy))
}

func ioctl(f *os.File, request uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(arg)); errno != 0 {
		return os.NewSyscallError("ioctl", errno)
	}
	return nil
}

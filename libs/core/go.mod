module github.com/cmdexec/cmdexec/libs/core

go 1.26.8

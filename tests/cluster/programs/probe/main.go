// What the tests' pods run: a server that tells who called it, and clients that tell what can be reached from where
// they run. An image of it needs no shell: tests run it in a pod with `kubectl exec POD -- /probe COMMAND`.
//
//	probe serve ADDRESS...            answers HTTP with a line "HOSTNAME LOCAL-ADDRESS CALLER", until SIGTERM
//	probe world CERTIFICATE KEY API   the internet, as far as the tests need it: HTTP on 80, HTTPS on 443, API on 6443
//	probe tcp HOST:PORT               connects
//	probe get URL                     prints the body of the answer; a certificate is not checked
//	probe lookup NAME                 prints the name's IPv4 addresses, one a line
//
// A client ends with 0, or with 1 and the reason on standard error. It gives up after PROBE_TIMEOUT (2s).
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	told, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(told, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(told context.Context, arguments []string) error {
	if len(arguments) < 2 {
		return errors.New("give a command and what to do it with")
	}
	command, rest := arguments[0], arguments[1:]
	switch {
	case command == "serve":
		return serve(told, rest)
	case command == "world" && len(rest) == 3:
		return world(told, rest[0], rest[1], rest[2])
	case len(rest) != 1:
		return fmt.Errorf("%s takes another number of arguments", command)
	}
	patience, err := patience()
	if err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(told, patience)
	defer cancel()
	switch command {
	case "tcp":
		return connect(limited, rest[0])
	case "get":
		return get(limited, rest[0])
	case "lookup":
		return lookup(limited, rest[0])
	default:
		return fmt.Errorf("there is no command %q", command)
	}
}

// How long a client tries.
func patience() (time.Duration, error) {
	if given := os.Getenv("PROBE_TIMEOUT"); given != "" {
		return time.ParseDuration(given)
	}
	return 2 * time.Second, nil
}

func connect(limited context.Context, address string) error {
	connection, err := new(net.Dialer).DialContext(limited, "tcp4", address)
	if err != nil {
		return err
	}
	return connection.Close()
}

func get(limited context.Context, url string) error {
	request, err := http.NewRequestWithContext(limited, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	// Whether something is reached is asked, not who it is.
	client := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.Copy(os.Stdout, response.Body); err != nil {
		return err
	}
	if response.StatusCode >= 400 {
		return errors.New(response.Status)
	}
	return nil
}

func lookup(limited context.Context, name string) error {
	addresses, err := net.DefaultResolver.LookupIP(limited, "ip4", name)
	for _, address := range addresses {
		fmt.Println(address)
	}
	return err
}

// Serves HTTP on each of the addresses until it is told to stop.
func serve(told context.Context, addresses []string) error {
	ended := make(chan error, len(addresses))
	for _, address := range addresses {
		go func() { ended <- http.ListenAndServe(address, http.HandlerFunc(tell)) }()
	}
	return first(told, ended)
}

// Serves what stands for the internet, on every address of the machine. What comes to port 6443 is passed on to api, so
// that an API server can have an address that looks public.
func world(told context.Context, certificate, key, api string) error {
	doors, err := net.Listen("tcp4", ":6443")
	if err != nil {
		return err
	}
	ended := make(chan error, 3)
	go func() { ended <- http.ListenAndServe(":80", http.HandlerFunc(tell)) }()
	go func() { ended <- http.ListenAndServeTLS(":443", certificate, key, http.HandlerFunc(tell)) }()
	go func() { ended <- pass(doors, api) }()
	return first(told, ended)
}

func first(told context.Context, ended chan error) error {
	select {
	case err := <-ended:
		return err
	case <-told.Done():
		return nil
	}
}

func tell(response http.ResponseWriter, request *http.Request) {
	name, _ := os.Hostname()
	fmt.Fprintln(response, name, request.Context().Value(http.LocalAddrContextKey), request.RemoteAddr)
}

func pass(from net.Listener, to string) error {
	for {
		near, err := from.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer near.Close()
			far, err := net.Dial("tcp4", to)
			if err != nil {
				fmt.Fprintln(os.Stderr, "probe:", err)
				return
			}
			defer far.Close()
			one := make(chan struct{}, 2)
			go copyAll(far, near, one)
			go copyAll(near, far, one)
			<-one
		}()
	}
}

// Both ends close with the first direction that ends: a TLS connection has no use for half of it.
func copyAll(to io.Writer, from io.Reader, done chan<- struct{}) {
	_, _ = io.Copy(to, from)
	done <- struct{}{}
}

package volume

import (
	"strconv"

	"github.com/holdfast-backup/holdfast/fs/guest"
)

// textNode is a section of LVM2's configuration text: name => int64, string, []any (of both) or *textNode.
type textNode struct {
	values map[string]any
	names  []string // in their order
}

func (t *textNode) section(name string) *textNode {
	s, _ := t.values[name].(*textNode)
	return s
}

func (t *textNode) text(name string) string {
	s, _ := t.values[name].(string)
	return s
}

// number gives an integer, or other when there is none.
func (t *textNode) number(name string, other int64) int64 {
	if n, ok := t.values[name].(int64); ok {
		return n
	}
	return other
}

func (t *textNode) list(name string) []any {
	l, _ := t.values[name].([]any)
	return l
}

// has reports whether a list of strings has s.
func (t *textNode) has(name, s string) bool {
	for _, v := range t.list(name) {
		if v == s {
			return true
		}
	}
	return false
}

// The bounds of the text beside its length.
const (
	maxTextDepth = 8
	maxTextNodes = 1 << 19
)

// textParser reads LVM2's configuration text (lvm.conf(5)):
//
//	name { … }    name = 12    name = "text"    name = [1, "a"]    # to the end of the line
type textParser struct {
	b     []byte
	pos   int
	nodes int
}

// parseText reads a whole text. ErrDamaged.
func parseText(b []byte) (*textNode, error) {
	p := &textParser{b: b}
	return p.section(0)
}

func (p *textParser) fail(what string) error {
	return guest.Damaged("LVM2 text at byte %d: %s", p.pos, what)
}

// next skips what does not count and gives the next byte, 0 at the end.
func (p *textParser) next() byte {
	for p.pos < len(p.b) {
		switch c := p.b[p.pos]; c {
		case ' ', '\t', '\n', '\r':
			p.pos++
		case '#':
			for p.pos < len(p.b) && p.b[p.pos] != '\n' {
				p.pos++
			}
		default:
			return c
		}
	}
	return 0
}

// section reads up to the closing brace, or the end at depth 0.
func (p *textParser) section(depth int) (*textNode, error) {
	if depth > maxTextDepth {
		return nil, p.fail("too deep")
	}
	t := &textNode{}
	for {
		switch c := p.next(); {
		case c == 0 && (depth == 0 || p.pos < len(p.b)):
			if p.pos < len(p.b) {
				return nil, p.fail("a zero byte")
			}
			return t, nil
		case c == 0:
			return nil, p.fail("the end, in a section")
		case c == '}' && depth > 0:
			p.pos++
			return t, nil
		}
		name := p.word()
		if name == "" {
			return nil, p.fail("no name")
		}
		v, err := p.value(depth)
		if err != nil {
			return nil, err
		}
		if t.values == nil {
			t.values = map[string]any{}
		}
		if _, ok := t.values[name]; !ok {
			t.names = append(t.names, name)
		}
		t.values[name] = v
	}
}

// value reads what stands behind a name.
func (p *textParser) value(depth int) (any, error) {
	if p.nodes++; p.nodes > maxTextNodes {
		return nil, p.fail("too much")
	}
	switch p.next() {
	case '{':
		p.pos++
		return p.section(depth + 1)
	case '=':
		p.pos++
	default:
		return nil, p.fail("neither { nor =")
	}
	if p.next() != '[' {
		return p.scalar()
	}
	p.pos++
	list := []any{}
	for {
		switch p.next() {
		case ']':
			p.pos++
			return list, nil
		case ',':
			p.pos++
			continue
		}
		if p.nodes++; p.nodes > maxTextNodes {
			return nil, p.fail("too much")
		}
		v, err := p.scalar()
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
}

func (p *textParser) scalar() (any, error) {
	if p.next() == '"' {
		return p.quoted()
	}
	w := p.word()
	if n, err := strconv.ParseInt(w, 10, 64); err == nil {
		return n, nil
	}
	if _, err := strconv.ParseFloat(w, 64); err == nil {
		return w, nil
	}
	return nil, p.fail("neither a number nor a text")
}

func (p *textParser) quoted() (any, error) {
	var s []byte
	for p.pos++; p.pos < len(p.b); p.pos++ {
		switch c := p.b[p.pos]; {
		case c == '"':
			p.pos++
			return string(s), nil
		case c == '\\' && p.pos+1 < len(p.b):
			p.pos++
			s = append(s, p.b[p.pos])
		default:
			s = append(s, c)
		}
	}
	return nil, p.fail("the end, in a text")
}

// word reads a name or a number.
func (p *textParser) word() string {
	p.next()
	from := p.pos
	for p.pos < len(p.b) {
		c := p.b[p.pos]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' && c != '-' && c != '.' && c != '+' {
			break
		}
		p.pos++
	}
	return string(p.b[from:p.pos])
}

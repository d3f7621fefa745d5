// What needs no answer of the server: keys, scrolling, the tip of a cell, the menu of a phone.
const chat = {
  box: () => document.querySelector('.message textarea'),
  focus() {
    // On a phone the keyboard would cover the answer.
    const hasMouse = matchMedia('(pointer: fine)').matches
    if (hasMouse && !document.querySelector('.q-dialog')) chat.box()?.focus()
  },
  menu(open) {
    document.body.classList.toggle('menu-open', open)
  },
  isAtEnd: true,
  follow() {
    const turns = document.querySelector('.turns')
    if (turns && chat.isAtEnd) turns.scrollTop = turns.scrollHeight
  },
  show(number) {
    const turn = document.getElementById(`turn-${number}`)
    if (!turn) return
    chat.isAtEnd = false
    turn.scrollIntoView({ block: 'start' })
    turn.classList.add('flash')
    setTimeout(() => turn.classList.remove('flash'), 1500)
  },
  tip(cell) {
    document.getElementById('tip')?.remove()
    if (!cell) return
    const tip = document.createElement('div')
    tip.id = 'tip'
    tip.textContent = cell.dataset.tip
    document.body.append(tip)
    const box = cell.getBoundingClientRect()
    tip.style.top = `${box.bottom + 6}px`
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`
  },
}

document.addEventListener('keydown', (event) => {
  if (event.key !== 'Escape' || event.isComposing) return
  chat.tip()
  if (document.body.classList.contains('menu-open')) chat.menu(false)
  else if (document.querySelector('.stop:not(.hidden)')) emitEvent('chat_stop')
})
// What is typed while no field has the focus, say after a click on a button, is a message.
document.addEventListener('keydown', (event) => {
  const isText = event.key.length === 1 && event.key !== ' '
  if (!isText || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return
  if (event.target.closest('input, textarea, select, .q-menu, .q-dialog')) return
  if (!document.querySelector('.q-dialog, .q-menu')) chat.box()?.focus()
})
document.addEventListener('click', (event) => {
  const cell = event.target.closest('.cell')
  const link = event.target.closest('.markdown a')
  if (cell) chat.show(cell.dataset.turn)
  chat.tip(cell)
  if (link) {
    event.preventDefault()
    open(link.href, '_blank', 'noopener,noreferrer')
  }
  if (event.target.closest('.sidebar .title, .sidebar .new, .sidebar .runs a')) chat.menu(false)
})
for (const kind of ['mouseover', 'focusin']) {
  document.addEventListener(kind, (event) => chat.tip(event.target.closest?.('.cell')))
}
document.addEventListener('scroll', (event) => {
  const turns = event.target
  if (!turns.classList?.contains('turns')) return
  chat.isAtEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 80
}, true)
new MutationObserver(chat.follow).observe(document, {
  childList: true,
  subtree: true,
  characterData: true,
})
